// Counts the ids of a training step: scores of cached rows, and a majority vote in each bucket of the others.
#include <algorithm>
#include <cstdint>

#include "recemb_buffer.h"

namespace {

// `_Count` of __init__.py.
struct Count {
  float* scores;
  const int64_t* slots;
  const float* slot_weights;  // null: 1, and 0 for a negative slot
  int64_t num_slots;
  int64_t* owners;
  float* votes;
  int64_t num_buckets, num_embeddings;
  const int64_t* ids;
  const float* id_weights;
  int64_t num_ids;
};

constexpr int64_t NOBODY = INT64_MAX;

// As recemb.cache.tracker.buckets_of.
inline int64_t bucket_of(int64_t id, int64_t buckets, bool hashed) {
  if (id < 0) return buckets;
  if (!hashed) return id;
  const int64_t product = static_cast<int64_t>(static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u);
  const int64_t rest = ((product >> 20) ^ product) % buckets;
  return rest < 0 ? rest + buckets : rest;
}

inline float weight_of(const float* weights, int64_t i, int64_t id) { return weights ? weights[i] : id >= 0 ? 1.f : 0.f; }

// As recemb.cache.tracker.cells_of.
constexpr int64_t NUM_CELLS = 1 << 16;

inline int64_t cell_of(int64_t id) {
  const int64_t product = static_cast<int64_t>(static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u);
  return ((product >> 29) ^ product) & (NUM_CELLS - 1);
}

struct Vote {
  int64_t bucket, held;
};

// Gives each bucket whose vote is below zero to the heaviest id that it was lost to, the smallest of equals. `sums` and
// `own` have room for a number of each cell and of each bucket.
void hand_over(const Count& c, const Vote* votes, float* sums, float* own) {
  const auto lost = [&](int64_t i) { return c.votes[votes[i].bucket] < 0; };
  const auto sum_of = [&](int64_t id) { return sums[cell_of(id)]; };
  // What is not reached is not cleared: there are more counters than ids.
  for (int64_t i = 0; i < c.num_ids; i++) sums[cell_of(c.ids[i])] = own[votes[i].bucket] = 0;
  for (int64_t i = 0; i < c.num_ids; i++) {
    if (!lost(i) || votes[i].held == c.ids[i]) continue;
    sums[cell_of(c.ids[i])] += weight_of(c.id_weights, i, c.ids[i]);
    c.owners[votes[i].bucket] = NOBODY;
  }
  for (int64_t i = 0; i < c.num_ids; i++) {
    const int64_t id = c.ids[i];
    if (!lost(i) || votes[i].held == id) continue;
    int64_t& owner = c.owners[votes[i].bucket];
    if (owner == NOBODY || sum_of(id) > sum_of(owner) || (sum_of(id) == sum_of(owner) && id < owner)) owner = id;
  }
  for (int64_t i = 0; i < c.num_ids; i++)
    if (lost(i) && c.owners[votes[i].bucket] == c.ids[i])
      own[votes[i].bucket] += weight_of(c.id_weights, i, c.ids[i]);
  for (int64_t i = 0; i < c.num_ids; i++)
    if (lost(i)) c.votes[votes[i].bucket] = std::min(-c.votes[votes[i].bucket], own[votes[i].bucket]);
}

}  // namespace

extern "C" {

int64_t recemb_split_count_size() { return sizeof(Count); }

// By one thread: sums are taken in the order of the ids, as torch takes them. Returns 0, or how many bytes there is no
// room for: nothing has been counted then.
int64_t recemb_split_count(const Count* count) {
  const Count& c = *count;
  static thread_local recemb::Buffer votes_room, sums, own;
  if (const int64_t lacks = recemb::lacking([&] {
        votes_room.room<Vote>(c.num_ids), sums.room<float>(NUM_CELLS), own.room<float>(c.num_buckets + 1);
      }))
    return lacks;
  Vote* const votes = votes_room.at<Vote>();
  for (int64_t i = 0; i < c.num_slots; i++)
    c.scores[std::max<int64_t>(c.slots[i], 0)] += weight_of(c.slot_weights, i, c.slots[i]);
  const bool hashed = c.num_buckets < c.num_embeddings;
  for (int64_t i = 0; i < c.num_ids; i++) {
    const int64_t id = c.ids[i], bucket = bucket_of(id, c.num_buckets, hashed), held = c.owners[bucket];
    const float weight = weight_of(c.id_weights, i, id);
    votes[i] = {bucket, held};
    c.votes[bucket] += held == id ? weight : -weight;
  }
  if (std::any_of(votes, votes + c.num_ids, [&](const Vote& vote) { return c.votes[vote.bucket] < 0; }))
    hand_over(c, votes, sums.at<float>(), own.at<float>());
  return 0;
}
}
