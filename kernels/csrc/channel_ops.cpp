// The plan's linears over weights in input-channel-major order: one list of the channels that
// count, sums of its parts for tiles of outputs, then what is done with the sums.
#include <algorithm>
#include <vector>

#include "plan_op.h"

// What products over channels need between their operations. Those of a plan come one behind the
// other and share it, so that it stays in the caches while weights run through them.
struct ChannelMemory {
  ChannelList list{nullptr, nullptr, 0, 0};
  uint8_t* marks = nullptr;  // [I]
  float* sums = nullptr;

  // At least so much of each; while a plan is made, before it runs.
  void reserve(int64_t in_features, int64_t value_bytes, int64_t sum_bytes) {
    list.channels = static_cast<int32_t*>(channels_.reserve((in_features + kListSlack) * 4));
    list.values = values_.reserve((in_features + kListSlack) * value_bytes);
    marks = static_cast<uint8_t*>(marks_.reserve(in_features));
    sums = static_cast<float*>(sums_.reserve(sum_bytes));
  }

 private:
  struct Buffer {
    AlignedMemory memory;
    int64_t size = -1;

    void* reserve(int64_t bytes) {
      if (bytes > size) memory = allocate_aligned(size = bytes);
      return memory.get();
    }
  };
  Buffer channels_, values_, marks_, sums_;
};

namespace {

constexpr int64_t kMostRows = 8;

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
  SelectArgs args;
  const int64_t first, most;
  std::shared_ptr<ChannelMemory> memory;

  GatherOp(const ChannelKernel& kernel, const ChannelSite& site, const SelectArgs& args,
           int64_t first, std::shared_ptr<ChannelMemory> memory)
      : kernel(kernel), site(site), args(args), first(first), most(args.batch),
        memory(std::move(memory)) {}
  // one row alone makes its list in ChannelsOp
  bool resize(int64_t rows) override {
    return (args.batch = rows_of_run(rows, most, first)) > 1;
  }
  void before() override {
    kernel.select_union(&args, memory->marks, &memory->list);
    note(site, memory->list.active, 0, 0);
  }
  int64_t chunks(int) const override { return args.batch; }
  void run(int64_t m, int64_t) override {
    const bool live = args.thresholds[m] < __builtin_inf();
    note(site, 0, kernel.gather(&args, &memory->list, m), live);
  }
};

// Sums of weights that share a list, as parts of the list: long runs of outputs keep memory busy and
// leave few tiles, so threads share those by channels. The number of parts is fixed, whatever the
// threads are: the order of addition depends on it.
constexpr int64_t kParts = 4, kFinishOutputs = 512;

struct Sums {
  const std::shared_ptr<ChannelMemory> memory;
  const std::vector<PlanChannels> weights;
  std::vector<int64_t> pitches, starts;  // of each weight's sums [kParts, batch, pitch]
  int64_t count = 0;

  Sums(std::shared_ptr<ChannelMemory> memory, const std::vector<PlanChannels>& weights,
       int64_t batch)
      : memory(std::move(memory)), weights(weights) {
    for (const PlanChannels& w : weights) {
      pitches.push_back((w.weight.out_features + kWord - 1) / kWord * kWord);
      starts.push_back(count);
      count += kParts * batch * pitches.back();
    }
  }
  float* of(size_t weight) const { return memory->sums + starts[weight]; }
};

struct ChannelsOp : Plan::Op {
  const ChannelKernel& kernel;
  const ChannelSite site;
  SelectArgs select;
  const int64_t first, most;
  std::shared_ptr<ChannelMemory> memory;
  std::shared_ptr<Sums> sums;
  int64_t items = 0;

  ChannelsOp(const ChannelKernel& kernel, const ChannelSite& site, const SelectArgs& select,
             int64_t first, std::shared_ptr<ChannelMemory> memory, std::shared_ptr<Sums> sums)
      : kernel(kernel), site(site), select(select), first(first), most(select.batch),
        memory(std::move(memory)), sums(std::move(sums)) {
    for (const PlanChannels& w : this->sums->weights) items += tile_count(&w.weight) * kParts;
  }
  bool resize(int64_t rows) override {
    return (select.batch = rows_of_run(rows, most, first)) > 0;
  }
  void before() override {
    if (select.batch != 1) return;  // a GatherOp has made the list
    kernel.select(&select, &memory->list);
    note(site, memory->list.active, memory->list.active,
         select.thresholds[0] < __builtin_inf());
  }
  int64_t chunks(int) const override { return items; }
  void run(int64_t item, int64_t) override {
    for (size_t i = 0; i < sums->weights.size(); ++i) {
      const ChannelWeight& weight = sums->weights[i].weight;
      const int64_t count = tile_count(&weight) * kParts;
      if (item < count) return sum(i, weight, item / kParts, item % kParts);
      item -= count;
    }
  }
  void sum(size_t i, const ChannelWeight& weight, int64_t tile, int64_t part) const {
    const int64_t groups = memory->list.count / kGroup, pitch = sums->pitches[i];
    float* to = sums->of(i) + part * select.batch * pitch + tile * weight.tile;
    const ChannelSums args{&weight, &memory->list, select.batch, tile,
                           groups * part / kParts * kGroup,
                           groups * (part + 1) / kParts * kGroup, to, pitch};
    kernel.sum(&args);
  }
};

struct FinishOp : Plan::Op {
  const ChannelKernel& kernel;
  std::shared_ptr<Sums> sums;
  const int64_t first, most;
  int64_t batch;
  const bool accumulate, gated;
  int64_t items = 0;

  FinishOp(const ChannelKernel& kernel, std::shared_ptr<Sums> sums, int64_t first,
           int64_t batch, bool accumulate, bool gated)
      : kernel(kernel), sums(std::move(sums)), first(first), most(batch), batch(batch),
        accumulate(accumulate), gated(gated) {
    for (size_t i = 0; i < outputs(); ++i) items += pieces(i);
  }
  bool resize(int64_t rows) override { return (batch = rows_of_run(rows, most, first)) > 0; }
  size_t outputs() const { return gated ? 1 : sums->weights.size(); }
  int64_t pieces(size_t i) const {
    return (sums->pitches[i] + kFinishOutputs - 1) / kFinishOutputs;
  }
  int64_t chunks(int) const override { return items; }
  void run(int64_t item, int64_t) override {
    for (size_t i = 0; i < outputs(); ++i) {
      if (item < pieces(i)) return finish(i, item * kFinishOutputs);
      item -= pieces(i);
    }
  }
  void finish(size_t i, int64_t begin) const {
    const PlanChannels& w = sums->weights[i];
    const ChannelFinish args{sums->of(i), gated ? sums->of(1) : nullptr, kParts, batch,
                             sums->pitches[i], w.weight.out_features, w.bias,
                             gated ? sums->weights[1].bias : nullptr, w.y,
                             accumulate ? w.y : nullptr};
    kernel.finish(&args, begin, std::min(begin + kFinishOutputs, w.weight.out_features));
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
  if (!channel_memory_) channel_memory_ = std::make_shared<ChannelMemory>();
  const std::shared_ptr<ChannelMemory> memory = channel_memory_;
  for (int64_t first = 0; first < site.batch; first += kMostRows) {
    const int64_t rows = std::min(kMostRows, site.batch - first);
    const SelectArgs select{rows_from<const void>(site.x, first, site.in_features, elem_bytes),
                            site.scales, site.thresholds + first, site.in_features, rows};
    std::vector<PlanChannels> here = weights;
    for (PlanChannels& w : here)
      w.y = rows_from<void>(w.y, first, w.weight.out_features, elem_bytes);
    auto sums = std::make_shared<Sums>(memory, here, rows);
    memory->reserve(site.in_features, rows * kernel.x_bytes, sums->count * 4);
    if (rows > 1) ops_.push_back(std::make_unique<GatherOp>(kernel, site, select, first, memory));
    ops_.push_back(std::make_unique<ChannelsOp>(kernel, site, select, first, memory, sums));
    ops_.push_back(std::make_unique<FinishOp>(kernel, sums, first, rows, accumulate, gated));
  }
}
