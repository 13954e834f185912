// From the stored form to input-channel-major order; see channels.h.
#pragma once

#include <stdint.h>

#include "channels.h"
#include "kernels.h"

// Fills `starts` [tiles * I + 1], counted in elements, for a packed weight that has passed
// check_weight. Returns the elements `data` needs, without the slack behind them; -1: more than
// starts can count.
int64_t measure_channels(const Weight& weight, int64_t tile, int64_t elem_bytes, int threads,
                         uint32_t* starts);

// Fills `data` as `starts` says.
void fill_channels(const Weight& weight, const ChannelWeight& channels, int64_t elem_bytes,
                   int threads, void* data);
