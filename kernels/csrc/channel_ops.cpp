// The plan's linears over weights in input-channel-major order: one list of the channels that
// count, then tiles of outputs.
#include <algorithm>
#include <vector>

#include "plan_op.h"

namespace {

constexpr int64_t kMostRows = 8;

struct ListMemory {
  AlignedMemory channels, values, marks;
  ChannelList list;

  ListMemory(int64_t in_features, int64_t batch, int64_t x_bytes)
      : channels(allocate_aligned((in_features + kListSlack) * 4)),
        values(allocate_aligned((in_features + kListSlack) * batch * x_bytes)),
        marks(allocate_aligned(in_features)),
        list{static_cast<int32_t*>(channels.get()), values.get(), 0, 0} {}
};

// Adds to the site's counts: channels listed, inputs that count, rows.
void note(const ChannelSite& site, int64_t listed, int64_t active, int64_t rows) {
  if (!site.counts) return;
  const int64_t added[] = {listed, active, rows};
  for (int i = 0; i < 3; ++i) __atomic_fetch_add(&site.counts[i], added[i], __ATOMIC_RELAXED);
}

// Several rows: the channels that any counts, then the inputs of each.
struct GatherOp : Plan::Op {
  const ChannelKernel& kernel;
  const ChannelSite site;
  const SelectArgs args;
  std::shared_ptr<ListMemory> memory;

  GatherOp(const ChannelKernel& kernel, const ChannelSite& site, const SelectArgs& args,
           std::shared_ptr<ListMemory> memory)
      : kernel(kernel), site(site), args(args), memory(std::move(memory)) {}
  void before() override {
    kernel.select_union(&args, static_cast<uint8_t*>(memory->marks.get()), &memory->list);
    note(site, memory->list.active, 0, 0);
  }
  int64_t chunks(int) const override { return args.batch; }
  void run(int64_t m, int64_t) override {
    const bool live = args.thresholds[m] < __builtin_inf();
    note(site, 0, kernel.gather(&args, &memory->list, m), live);
  }
};

struct ChannelsOp : Plan::Op {
  const ChannelKernel& kernel;
  const ChannelSite site;
  const SelectArgs select;
  std::shared_ptr<ListMemory> memory;
  const std::vector<PlanChannels> weights;
  const bool accumulate, gated;
  int64_t tiles = 0;

  ChannelsOp(const ChannelKernel& kernel, const ChannelSite& site, const SelectArgs& select,
             std::shared_ptr<ListMemory> memory, const std::vector<PlanChannels>& weights,
             bool accumulate, bool gated)
      : kernel(kernel), site(site), select(select), memory(std::move(memory)), weights(weights),
        accumulate(accumulate), gated(gated) {
    for (const PlanChannels& w : weights) tiles += tile_count(&w.weight);
    if (gated) tiles /= 2;
  }
  void before() override {
    if (select.batch != 1) return;  // a GatherOp has made the list
    kernel.select(&select, &memory->list);
    note(site, memory->list.active, memory->list.active,
         select.thresholds[0] < __builtin_inf());
  }
  int64_t chunks(int) const override { return tiles; }
  void run(int64_t chunk, int64_t) override {
    for (const PlanChannels& w : weights) {
      const int64_t count = tile_count(&w.weight);
      if (chunk < count) {
        const ChannelWeight* up = gated ? &weights[1].weight : nullptr;
        const ChannelArgs args{&w.weight, up,  &memory->list, select.batch,
                               w.bias,    gated ? weights[1].bias : nullptr,
                               w.y,       accumulate ? w.y : nullptr};
        return kernel.multiply(&args, chunk);
      }
      chunk -= count;
    }
  }
};

// The same for rows from `first` on.
template <class T> T* rows_from(T* data, int64_t first, int64_t width, int64_t elem_bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) +
                              static_cast<uintptr_t>(first * width * elem_bytes));
}

}  // namespace

void Plan::add_channels(const ChannelSite& site, const std::vector<PlanChannels>& weights,
                        bool accumulate, bool gated) {
  const ChannelKernel& kernel = isa_.channels[dtype_];
  const int64_t elem_bytes = dtype_ == kF32 ? 4 : 2;
  for (int64_t first = 0; first < site.batch; first += kMostRows) {
    const int64_t rows = std::min(kMostRows, site.batch - first);
    const SelectArgs select{rows_from<const void>(site.x, first, site.in_features, elem_bytes),
                            site.scales, site.thresholds + first, site.in_features, rows};
    auto memory = std::make_shared<ListMemory>(site.in_features, rows, kernel.x_bytes);
    std::vector<PlanChannels> here = weights;
    for (PlanChannels& w : here)
      w.y = rows_from<void>(w.y, first, w.weight.out_features, elem_bytes);
    if (rows > 1) ops_.push_back(std::make_unique<GatherOp>(kernel, site, select, memory));
    ops_.push_back(
        std::make_unique<ChannelsOp>(kernel, site, select, memory, here, accumulate, gated));
  }
}
