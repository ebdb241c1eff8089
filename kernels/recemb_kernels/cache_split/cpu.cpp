// Splits a batch into ids that are cached and ids that are not, in one pass over it.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "recemb_buffer.h"

namespace {

// Ids from which a second thread saves more than it costs.
constexpr int64_t SERIAL = 1 << 12;
// Ids between asking for an entry of the table and reading it.
constexpr int64_t AHEAD = 16;

// A key and its slot, in one cache line: the key is -1 in a place that is free.
struct Entry {
  int64_t key, slot;
};

// `Call` of __init__.py.
struct Call {
  int64_t num_features, batch, num_ids, threads;
  const int64_t *ids, *offsets;
  const int64_t* base;   // per feature: what is added to its ids, -1 without a cache
  const Entry* table;    // open addressing
  int64_t shift;         // 64 - log2 of its size
  int64_t *out_ids, *out_offsets;
  int64_t* order;   // null, or where in the batch each id of `out_ids` was
  int64_t* bounds;  // where in `out_ids` every feature begins, and the end
};

// Fibonacci hashing (Knuth, 6.4).
inline uint64_t place(int64_t key, int64_t shift) { return static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u >> shift; }

inline int64_t slot_of(const Call& call, int64_t key) {
  const uint64_t mask = ~uint64_t{0} >> call.shift;
  for (uint64_t at = place(key, call.shift);; at = (at + 1) & mask) {
    if (call.table[at].key == key) return call.table[at].slot;
    if (call.table[at].key < 0) return -1;
  }
}

// Bags [first, last), and how many of their ids are hot.
struct Share {
  int64_t first, last, hot = 0, cold = 0;
};

// Writes a share's hot ids to the front of its own positions in `ids` and its cold ones, last to first, to their end;
// offsets as if nothing came before the share.
template <bool ORDER>
void split(const Call& call, Share& share, int64_t* ids, int64_t* order) {
  const int64_t bags = call.num_features * call.batch, *offsets = call.offsets;
  const int64_t begin = offsets[share.first], end = offsets[share.last];
  int64_t hot = begin, cold = end, cached = 0;
  for (int64_t f = 0; f < call.num_features; f++) {
    const int64_t base = call.base[f], rank = cached;
    cached += base >= 0;
    const int64_t from = std::max(share.first, f * call.batch), to = std::min(share.last, (f + 1) * call.batch);
    if (from >= to) continue;
    if (base < 0) {
      const int64_t moved = hot - offsets[from], count = offsets[to] - offsets[from];
      for (int64_t bag = from; bag < to; bag++) call.out_offsets[bag] = offsets[bag] + moved - begin;
      std::copy_n(call.ids + offsets[from], count, ids + hot);  // of no ids there are no addresses
      for (int64_t i = 0; ORDER && i < count; i++) order[hot + i] = offsets[from] + i;
      hot += count;
      continue;
    }
    int64_t* cold_offsets = call.out_offsets + bags + (rank - f) * call.batch;
    for (int64_t bag = from; bag < to; bag++) {
      call.out_offsets[bag] = hot - begin, cold_offsets[bag] = end - cold;
      for (int64_t i = offsets[bag]; i < offsets[bag + 1]; i++) {
        // Of the next feature's ids some with the wrong base, which does no harm.
        if (i + AHEAD < end) __builtin_prefetch(call.table + place(call.ids[i + AHEAD] + base, call.shift));
        const int64_t slot = slot_of(call, call.ids[i] + base);
        const bool hit = slot >= 0;
        // No branch: which ids are cached cannot be foreseen.
        cold -= !hit;
        const int64_t to_at = hit ? hot : cold;
        hot += hit;
        ids[to_at] = hit ? slot : call.ids[i];
        if (ORDER) order[to_at] = i;
      }
    }
  }
  share.hot = hot - begin, share.cold = end - cold;
}

void split(const Call& call, Share& share, int64_t* ids, int64_t* order) {
  if (order)
    split<true>(call, share, ids, order);
  else
    split<false>(call, share, ids, order);
}

// Adds to the offsets of a share's bags what is before them in the hot and in the cold stream.
void shift_offsets(const Call& call, const Share& share, int64_t hot, int64_t cold) {
  int64_t* cold_offsets = call.out_offsets + call.num_features * call.batch;
  if (hot)
    for (int64_t bag = share.first; bag < share.last; bag++) call.out_offsets[bag] += hot;
  for (int64_t f = 0; f < call.num_features; f++) {
    if (call.base[f] < 0) continue;
    const int64_t from = std::max(share.first, f * call.batch), to = std::min(share.last, (f + 1) * call.batch);
    for (int64_t bag = from; bag < to; bag++) cold_offsets[bag - f * call.batch] += cold;
    cold_offsets += call.batch;
  }
}

// False where there is no room for it; nothing has been written then.
bool split_together(const Call& call, int threads) {
  const int64_t bags = call.num_features * call.batch;
  // Of the calling thread's own, and kept: fresh pages cost more than what is written to them.
  thread_local recemb::Buffer room, shares_room;
  if (recemb::lacking([&] {
        room.room<int64_t>(call.num_ids * (call.order ? 2 : 1)), shares_room.room<Share>(threads);
      }))
    return false;
  int64_t* const ids = room.at<int64_t>();
  int64_t* const order = call.order ? ids + call.num_ids : nullptr;
  Share* const shares = shares_room.at<Share>();
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), own = omp_get_thread_num();
    const auto start = [&](int t) {
      return t == team ? bags : std::lower_bound(call.offsets, call.offsets + bags, call.num_ids * t / team) - call.offsets;
    };
    Share& share = shares[own];
    share = {own ? start(own) : 0, start(own + 1)};
    split(call, share, ids, order);
#pragma omp barrier
    int64_t hot = 0, cold = 0, hot_before = 0, cold_before = 0;
    for (int t = 0; t < team; t++) {
      if (t == own) hot_before = hot, cold_before = cold;
      hot += shares[t].hot, cold += shares[t].cold;
    }
    const int64_t begin = call.offsets[share.first], end = call.offsets[share.last];
    const auto move = [&](const int64_t* from, int64_t* to) {
      std::copy(from + begin, from + begin + share.hot, to + hot_before);
      std::reverse_copy(from + end - share.cold, from + end, to + hot + cold_before);
    };
    move(ids, call.out_ids);
    if (call.order) move(order, call.order);
    shift_offsets(call, share, hot_before, hot + cold_before);
  }
  return true;
}

}  // namespace

extern "C" {

int64_t recemb_split_call_size() { return sizeof(Call); }

void recemb_split_fail(int64_t at) { recemb::Buffer::failing = at; }

// Fills a table of 2^(64 - shift) entries, more than `count`, so that a search ends.
void recemb_split_index(const int64_t* keys, const int64_t* slots, int64_t count, Entry* table, int64_t shift) {
  const uint64_t mask = ~uint64_t{0} >> shift;
  std::fill(table, table + mask + 1, Entry{-1, -1});
  for (int64_t i = 0; i < count; i++) {
    uint64_t at = place(keys[i], shift);
    while (table[at].key >= 0) at = (at + 1) & mask;
    table[at] = {keys[i], slots[i]};
  }
}

void recemb_split(const Call* call) {
  const int64_t bags = call->num_features * call->batch;
  const bool together = call->threads > 1 && call->num_ids >= SERIAL;
  // By one thread it needs no memory.
  if (!together || !split_together(*call, static_cast<int>(call->threads))) {
    Share share{0, bags};
    split(*call, share, call->out_ids, call->order);
    std::reverse(call->out_ids + share.hot, call->out_ids + call->num_ids);
    if (call->order) std::reverse(call->order + share.hot, call->order + call->num_ids);
    shift_offsets(*call, share, 0, share.hot);
  }
  int64_t features = call->num_features;
  for (int64_t f = 0; f < call->num_features; f++) features += call->base[f] >= 0;
  call->out_offsets[features * call->batch] = call->num_ids;
  for (int64_t f = 0; f <= features; f++) call->bounds[f] = call->out_offsets[f * call->batch];
}
}
