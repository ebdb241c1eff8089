// The nodes of a level grouped by digit, within each slice.
#include <algorithm>

#include "recemb_nodes.h"
#include "recemb_plan.h"
#include "recemb_share.h"

namespace recemb {

namespace {

// A level's own part of the memory of sorted records.
struct Rooms {
  Narrow *a, *b;
};
Rooms rooms_of(const Table& table, int64_t l, const PlanRoom& room, int64_t index, int64_t base) {
  Narrow* a = room.records_of<Narrow>(index, base) + 2 * (l - 1) * (table.ids + 2);
  return {a, a + table.level[l].nodes};
}

// Groups the nodes of a slice by digit, and counts what lies below each run: hot ids stand together and make some far
// heavier than others. Writes what belongs to this slice alone.
void group_slice(Level& level, int64_t s, int64_t slices, Rooms rooms) {
  const int64_t from = level.slice_node[s], to = level.slice_node[s + 1];
  const int32_t* group = level.group;
  int32_t* by_digit = const_cast<int32_t*>(level.by_digit);
  int32_t* run_start = const_cast<int32_t*>(level.run_start);
  int32_t* run_group = const_cast<int32_t*>(level.run_group);
  int32_t* run_below = const_cast<int32_t*>(level.run_below);
  int32_t* piece_start = const_cast<int32_t*>(level.piece_start);
  int64_t run = from, piece = from;
  int32_t below_run = level.first[from];
  const auto children = [&](int64_t node) { return level.first[node + 1] - level.first[node]; };
  const auto add_run = [&](int64_t of, int64_t start, int64_t past, int32_t below) {
    run_group[run] = static_cast<int32_t>(of), run_start[run] = static_cast<int32_t>(start);
    run_below[run++] = below_run, below_run += below;
    for (; start < past; start += PIECE) piece_start[piece++] = static_cast<int32_t>(start);
  };
  if (counts(level.touched, to - from)) {
    int32_t next[COUNTED], below[COUNTED];
    std::fill_n(next, level.touched, 0), std::fill_n(below, level.touched, 0);
    for (int64_t i = from; i < to; i++) next[group[i]]++, below[group[i]] += children(i);
    int64_t start = from;
    for (int64_t g = 0; g < level.touched; g++) {
      const int64_t past = start + next[g];
      if (past > start) add_run(g, start, past, below[g]);
      next[g] = static_cast<int32_t>(start), start = past;
    }
    for (int64_t i = from; i < to; i++) by_digit[next[group[i]]++] = static_cast<int32_t>(i);
  } else {
    const auto read = [=](int64_t i) { return Narrow(static_cast<uint32_t>(group[from + i]), from + i); };
    const Narrow* sorted = radix_sort(read, rooms.a + from, rooms.b + from, to - from, bits_of(level.touched - 1));
    for (int64_t i = from, past; i < to; i = past) {
      const uint64_t of = sorted[i - from].key();
      int32_t below = 0;
      for (past = i; past < to && sorted[past - from].key() == of; past++)
        by_digit[past] = sorted[past - from].value(), below += children(by_digit[past]);
      add_run(static_cast<int64_t>(of), i, past, below);
    }
  }
  const_cast<int32_t*>(level.past_run)[s] = static_cast<int32_t>(run);
  const_cast<int32_t*>(level.past_piece)[s] = static_cast<int32_t>(piece);
  // Where a slice has as many runs as nodes, the next one's first run, and who groups it, says where its last one ends.
  if (run < to || s + 1 == slices) run_start[run] = static_cast<int32_t>(to), run_below[run] = below_run;
  if (piece < to || s + 1 == slices) piece_start[piece] = static_cast<int32_t>(to);
}

}  // namespace

void number_digits(const Call* call, int64_t index, int64_t base, int64_t l, const PlanRoom& room) {
  Table& table = call->tables[index];
  Level& level = table.level[l];
  const int64_t radix = radix_of(table, l);
  int32_t* group = const_cast<int32_t*>(level.group);
  int32_t* digit = const_cast<int32_t*>(level.digit);
  if (counts(radix, level.nodes)) {
    int32_t number[COUNTED];
    std::fill_n(number, radix, 0);
    for (int64_t i = 0; i < level.nodes; i++) number[group[i]] = 1;
    level.touched = number_values(radix, [&](int64_t d) { return number[d] != 0; }, number, digit);
    for (int64_t i = 0; i < level.nodes; i++) group[i] = number[group[i]];
    return;
  }
  const auto read = [group](int64_t i) { return Narrow(static_cast<uint32_t>(group[i]), i); };
  const Rooms rooms = rooms_of(table, l, room, index, base);
  const Narrow* sorted = radix_sort(read, rooms.a, rooms.b, level.nodes, bits_of(radix - 1));
  level.touched = 0;
  uint64_t before = ~uint64_t{0};
  for (int64_t i = 0; i < level.nodes; i++) {
    const uint64_t key = sorted[i].key();
    level.touched += key != before, before = key;
    digit[level.touched - 1] = static_cast<int32_t>(key);
    group[sorted[i].value()] = static_cast<int32_t>(level.touched - 1);
  }
}

void plan_level(const Call* call, int64_t index, int64_t base, int64_t l, const PlanRoom& room) {
  Table& table = call->tables[index];
  if (l == 0 || l >= table.order) return;
  number_digits(call, index, base, l, room);
  const Rooms rooms = rooms_of(table, l, room, index, base);
  for (int64_t s = 0; s < table.slices; s++) group_slice(table.level[l], s, table.slices, rooms);
}

void plan_levels_together(const Call* call, int64_t index, int64_t base, const PlanRoom& room) {
  Table& table = call->tables[index];
  // Slice by slice, for those who are to work on them; of each its last levels are the largest: first.
  const int64_t levels = table.order - 1;
  if (levels == 0) return;
  const auto nodes_before = [&](int64_t task) {
    const int64_t s = task / levels, begun = task % levels;
    int64_t nodes = 0;
    for (int64_t l = 1; l <= levels; l++) nodes += table.level[l].slice_node[l > levels - begun ? s + 1 : s];
    return nodes;
  };
  share_tasks(0, levels * table.slices, nodes_before, [&](int64_t task) {
    const int64_t l = levels - task % levels;
    group_slice(table.level[l], task / levels, table.slices, rooms_of(table, l, room, index, base));
  });
}

}  // namespace recemb
