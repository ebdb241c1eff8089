#include "recemb_plan.h"

#include <omp.h>

#include <algorithm>

#include "recemb_parts.h"
#include "recemb_sort.h"

namespace recemb {

namespace {

// 32-bit arrays of a plan: perm, then per level parent, first, digit, group, by_digit, runs (3), pieces, slices (3).
constexpr int64_t ARRAYS_PER_LEVEL = 12;
int64_t arrays_of(int64_t order) { return 1 + ARRAYS_PER_LEVEL * order; }

struct Arrays {
  int32_t* next;
  int64_t room;
  int32_t* take() {
    int32_t* here = next;
    next += room;
    return here;
  }
};

// x / by of an x below 2^53, where a division of doubles gives the same and takes a fraction of the time.
uint64_t small_quotient(uint64_t x, uint64_t by) {
  const auto real = [](uint64_t n) { return static_cast<double>(static_cast<int64_t>(n)); };
  return static_cast<uint64_t>(static_cast<int64_t>(real(x) / real(by)));
}
uint64_t quotient(uint64_t x, uint64_t by) { return x >> 53 ? x / by : small_quotient(x, by); }

// What is above the last digit of each number, which may take the numbers' place, and that digit.
template <class Quotient>
void split(const uint64_t* numbers, int64_t n, Quotient quotient, uint64_t radix, uint64_t* upper, int32_t* digit) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const uint64_t number = numbers[i], above = quotient(number);
    digit[i] = static_cast<int32_t>(number - above * radix);
    upper[i] = above;
  }
}

// Number of an id with its digits in reverse: the last digit becomes the most significant.
struct Mirror {
  const TableCode& code;
  uint64_t operator()(uint64_t key) const {
    uint64_t digits[MAX_ORDER], mirrored = 0;
    for (int64_t l = code.order - 1; l > 0; l--) {
      const uint64_t upper = quotient(key, code.radix[l]);
      digits[l] = key - upper * code.radix[l];
      key = upper;
    }
    digits[0] = key;
    for (int64_t l = code.order - 1; l >= 0; l--) mirrored = mirrored * code.radix[l] + digits[l];
    return mirrored;
  }
};

int64_t radix_of(const Table& table, int64_t level) {
  return table.code->radix[table.mirrored ? table.order - 1 - level : level];
}

// The nodes of every level, from sorted records, whose memory it takes.
template <class Record>
void grow_tree(Table& table, Record* records, int64_t* keys, int32_t* perm) {
  const int64_t last = table.order - 1;
  const auto first = [&](int64_t l) { return const_cast<int32_t*>(table.level[l].first); };
  for (int64_t i = 0; i < table.ids; i++) perm[i] = records[i].value();
  // Of a level's nodes, their digits read as one number.
  uint64_t *numbers = reinterpret_cast<uint64_t*>(keys), *room = reinterpret_cast<uint64_t*>(records);
  const auto key = [records](int64_t i) { return records[i].key(); };
  int64_t nodes = find_runs(key, table.ids, numbers, first(last), nullptr);
  table.level[last].nodes = table.level[last].touched = nodes;
  for (int64_t l = last; l > 0; l--, numbers = room) {
    const uint64_t radix = radix_of(table, l);
    int32_t* parent = const_cast<int32_t*>(table.level[l].parent);
    int32_t* digit = const_cast<int32_t*>(table.level[l].group);  // where the digits' groups will be
    if (table.most >> 53)
      split(numbers, nodes, [&](uint64_t x) { return x / radix; }, radix, room, digit);
    else
      split(numbers, nodes, [&](uint64_t x) { return small_quotient(x, radix); }, radix, room, digit);
    nodes = find_runs([room](int64_t i) { return room[i]; }, nodes, room, first(l - 1), parent);
    table.level[l - 1].nodes = table.level[l - 1].touched = nodes;
  }
  // The digit of a table of one level is its key, which may not fit.
  int32_t* digit = const_cast<int32_t*>(table.level[0].digit);
  for (int64_t node = 0; node < nodes && last > 0; node++) digit[node] = static_cast<int32_t>(numbers[node]);
}

// Values that have a counter each, on the stack, where these are not many more than what is counted.
constexpr int64_t COUNTED = int64_t{1} << SORT_BITS;
bool counts(int64_t values, int64_t nodes) { return values <= std::min(COUNTED, 4 * nodes + 64); }

// Numbers the distinct digits of a level's nodes in their order; `group` holds the digits and ends as these numbers.
void number_digits(Level& level, int64_t radix, Narrow* a, Narrow* b) {
  int32_t* group = const_cast<int32_t*>(level.group);
  int32_t* digit = const_cast<int32_t*>(level.digit);
  level.touched = 0;
  if (counts(radix, level.nodes)) {
    int32_t number[COUNTED];
    std::fill_n(number, radix, 0);
    for (int64_t i = 0; i < level.nodes; i++) number[group[i]] = 1;
    for (int64_t d = 0; d < radix; d++)
      if (number[d]) digit[level.touched] = static_cast<int32_t>(d), number[d] = static_cast<int32_t>(level.touched++);
    for (int64_t i = 0; i < level.nodes; i++) group[i] = number[group[i]];
    return;
  }
  const auto read = [group](int64_t i) { return Narrow(static_cast<uint32_t>(group[i]), i); };
  const Narrow* sorted = radix_sort(read, a, b, level.nodes, bits_of(radix - 1));
  uint64_t before = ~uint64_t{0};
  for (int64_t i = 0; i < level.nodes; i++) {
    const uint64_t key = sorted[i].key();
    level.touched += key != before, before = key;
    digit[level.touched - 1] = static_cast<int32_t>(key);
    group[sorted[i].value()] = static_cast<int32_t>(level.touched - 1);
  }
}

// Groups a level's nodes by slice and digit, and counts what lies below each run: hot ids stand together and make some
// far heavier than others. `group` holds the digits and ends as indices of the distinct ones.
void group_level(Level& level, int64_t slices, int64_t radix, Narrow* a, Narrow* b) {
  number_digits(level, radix, a, b);
  const int32_t* group = level.group;
  int32_t* by_digit = const_cast<int32_t*>(level.by_digit);
  int32_t* run_start = const_cast<int32_t*>(level.run_start);
  int32_t* run_group = const_cast<int32_t*>(level.run_group);
  int32_t* run_below = const_cast<int32_t*>(level.run_below);
  int32_t* piece_start = const_cast<int32_t*>(level.piece_start);
  int64_t runs = 0, pieces = 0;
  const auto children = [&](int64_t node) { return level.first[node + 1] - level.first[node]; };
  const auto add_run = [&](int64_t of, int64_t from, int64_t to, int32_t below) {
    run_below[runs + 1] = run_below[runs] + below;
    run_group[runs++] = static_cast<int32_t>(of), run_start[runs] = static_cast<int32_t>(to);
    for (; from < to; from += PIECE) piece_start[pieces++] = static_cast<int32_t>(from);
  };
  run_start[0] = run_below[0] = 0;
  for (int64_t s = 0; s < slices; s++) {
    const int64_t from = level.slice_node[s], to = level.slice_node[s + 1];
    const_cast<int32_t*>(level.slice_run)[s] = static_cast<int32_t>(runs);
    const_cast<int32_t*>(level.slice_piece)[s] = static_cast<int32_t>(pieces);
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
      continue;
    }
    const auto read = [=](int64_t i) { return Narrow(static_cast<uint32_t>(group[from + i]), from + i); };
    const Narrow* sorted = radix_sort(read, a, b, to - from, bits_of(level.touched - 1));
    for (int64_t i = from, past; i < to; i = past) {
      const uint64_t of = sorted[i - from].key();
      int32_t below = 0;
      for (past = i; past < to && sorted[past - from].key() == of; past++)
        by_digit[past] = sorted[past - from].value(), below += children(by_digit[past]);
      add_run(static_cast<int64_t>(of), i, past, below);
    }
  }
  piece_start[pieces] = static_cast<int32_t>(level.nodes);
  const_cast<int32_t*>(level.slice_run)[slices] = static_cast<int32_t>(runs);
  const_cast<int32_t*>(level.slice_piece)[slices] = static_cast<int32_t>(pieces);
}

// Work of the products of a tree with these numbers of nodes per level.
double product_cost(const Table& table, bool mirrored, const int64_t* nodes) {
  double cost = 0;
  for (int64_t l = 1; l + 1 < table.order; l++) cost += nodes[l] * table.code->product_cost[mirrored][l];
  return cost;
}

// Bits of a table of bits, in which distinct suffixes are counted.
constexpr uint64_t MOST = uint64_t{1} << 20;

// Whether products of suffixes are enough fewer than products of prefixes to sort again. Depends on the distinct
// ids alone, so that equal batches are computed in equal ways. `seen` has room for MOST bits.
bool mirror_is_cheaper(const Table& table, const int64_t* keys, uint64_t* seen) {
  const TableCode& code = *table.code;
  const int64_t levels = table.order;
  if (levels < 3 || code.product_cost[1][1] == 0) return false;
  int64_t straight[MAX_ORDER], mirrored[MAX_ORDER] = {};
  for (int64_t l = 0; l < levels; l++) straight[l] = table.level[l].nodes;
  const double most = 0.75 * product_cost(table, false, straight);
  // Distinct suffixes of each length; large tables of bits count hashes, and two suffixes with one hash count once.
  uint64_t span = code.radix[levels - 1];
  for (int64_t l = 1; l + 1 < levels; l++) {
    span *= code.radix[levels - 1 - l];
    std::fill_n(seen, std::min(span + 63, MOST) / 64, 0);
    for (int64_t u = 0; u < table.rows(); u++) {
      uint64_t suffix = static_cast<uint64_t>(keys[u]);
      suffix -= quotient(suffix, span) * span;
      if (span > MOST) suffix = suffix * 0x9E3779B97F4A7C15u >> 44;
      const uint64_t bit = uint64_t{1} << (suffix % 64);
      mirrored[l] += !(seen[suffix / 64] & bit);
      seen[suffix / 64] |= bit;
      // Mostly a few hundred rows tell.
      if (u % 256 == 255 && product_cost(table, true, mirrored) >= most) return false;
    }
  }
  return product_cost(table, true, mirrored) < most;
}

// Largest number that a key of the table may be, mirrored or not.
uint64_t largest_key(const Call* call, const Table& table) {
  uint64_t most = 1;
  for (int64_t l = 0; l < table.order; l++) most *= table.code->radix[l];
  if (most) return most - 1;
  for (int64_t k = 0; k < table.num_features; k++) {  // keys that are no digits have no radix
    const int64_t f = table.features[k];
    for (int64_t i = call->offsets[f * call->batch]; i < call->offsets[(f + 1) * call->batch]; i++)
      most |= static_cast<uint64_t>(call->ids[i] + call->features[f].key_base);
  }
  return most;
}

uint64_t straight(uint64_t key) { return key; }

// Calls act(read, begin, end) for each feature of the table: its records are read(r) for r in [begin, end), where those
// of all features follow each other, by `number` of their keys.
template <class Record, class Number, class Act>
void each_part(const Call* call, const Table& table, Number number, Act act) {
  for (int64_t k = 0, begin = 0, end; k < table.num_features; k++, begin = end) {
    const int64_t f = table.features[k], first = call->offsets[f * call->batch], base = call->features[f].key_base;
    end = begin + call->offsets[(f + 1) * call->batch] - first;
    act([=, ids = call->ids, shift = first - begin](int64_t r) {
      return Record(number(static_cast<uint64_t>(ids[shift + r] + base)), shift + r);
    }, begin, end);
  }
}

// Sorts the table's ids by `number` of their keys, into `a` or `b`.
template <class Record, class Number>
Record* sort_keys(const Call* call, const Table& table, Number number, Record* a, Record* b) {
  const int bits = bits_of(table.most);
  Record* sorted = a;
  each_part<Record>(call, table, number, [&](auto read, int64_t begin, int64_t end) {
    if (table.num_features == 1)
      sorted = radix_sort(read, a, b, table.ids, bits);
    else
      for (int64_t r = begin; r < end; r++) b[r] = read(r);
  });
  return table.num_features == 1 ? sorted : radix_sort([b](int64_t i) { return b[i]; }, a, b, table.ids, bits);
}

// Sorts the ids by all threads of a region, each a range of keys: all read all ids, but what one writes no other reads
// before all are done. Cores that share no cache would hand each other all of every pass. `counts` is of this table:
// some threads go on to the next one before others have read it.
template <class Record>
Record* sort_together(const Call* call, const Table& table, Record* a, Record* b, int64_t* counts) {
  const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads(), n = table.ids;
  // The ranges' ends, from a sample of the ids.
  constexpr int64_t SAMPLES = 64;
  uint64_t sample[SAMPLES];
  each_part<Record>(call, table, straight, [&](auto read, int64_t begin, int64_t end) {
    for (int64_t k = 0; k < SAMPLES; k++)
      if (const int64_t r = (2 * k + 1) * n / (2 * SAMPLES); r >= begin && r < end) sample[k] = read(r).key();
  });
  std::sort(sample, sample + SAMPLES);
  const uint64_t low = me ? sample[SAMPLES * me / threads] : 0;
  const uint64_t width = (me + 1 < threads ? sample[SAMPLES * (me + 1) / threads] : table.most + 1) - low;
  int64_t own = 0, before = 0;
  each_part<Record>(call, table, straight, [&](auto read, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) own += read(r).key() - low < width;
  });
  counts[me] = own;
#pragma omp barrier
  for (int64_t t = 0; t < me; t++) before += counts[t];
  const int bits = bits_of(table.most);
  Record* const to = sort_passes(n, bits) % 2 ? a : b;
  a += before, b += before;
  Record* next = b;
  each_part<Record>(call, table, straight, [&](auto read, int64_t begin, int64_t end) {
    next = select_keys(read, begin, end, low, width, next);
  });
  Record* const sorted = radix_sort([b](int64_t i) { return b[i]; }, a, b, own, bits);
  if (sorted != to + before) std::copy(sorted, sorted + own, to + before);  // of few records
  return to;
}

// Calls `act` with the table's room for records, as records wide enough for its keys.
template <class Act>
void with_records(const Table& table, char* room, Act act) {
  if (table.most >> 32)
    act(reinterpret_cast<Wide*>(room));
  else
    act(reinterpret_cast<Narrow*>(room));
}

char* records_of(const PlanRoom& room, int64_t index, int64_t base) {
  return reinterpret_cast<char*>(room.records.at<Wide>() + room.each * (base + 2 * index));
}

}  // namespace

void PlanRoom::reserve(const Call* call) {
  int64_t ids = 0, total = 0;
  each = 2, words = 0;
  for (int64_t t = 0; t < call->num_tables; t++) {
    Table& table = call->tables[t];
    const int64_t room = table.ids + 2;
    ids += room, total += room * arrays_of(table.order);
    // Sorted, they make room for two narrow ones of every node of each level but the first.
    each = std::max(each, table.order - 1);
    if (table.order > 2) words = MOST / 64;  // of what tells whether a mirror is cheaper
    table.most = largest_key(call, table), table.sorted = nullptr;
  }
  keys.room<int64_t>(ids);
  arrays.room<int32_t>(total);
  records.room<Wide>(each * ids);
}

void PlanRoom::reserve_threads(int64_t tables, int64_t threads) {
  counts.room<int64_t>(tables * threads);
  scratch.room<uint64_t>(threads * words);
}

void count_ids(const Call* call) {
  for (int64_t t = 0; t < call->num_tables; t++) call->tables[t].ids = 0;
  for (int64_t f = 0; f < call->num_features; f++)
    call->tables[call->features[f].table].ids +=
        call->offsets[(f + 1) * call->batch] - call->offsets[f * call->batch];
}

void sort_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room) {
  Table& table = call->tables[index];
  with_records(table, records_of(room, index, base), [&](auto* a) {
    int64_t* const counts = room.counts.at<int64_t>() + index * omp_get_num_threads();
    void* sorted = sort_together(call, table, a, a + table.ids, counts);
    if (omp_get_thread_num() == 0) table.sorted = sorted;
  });
}

void plan_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room, int thread) {
  Table& table = call->tables[index];
  int64_t before = 0;
  for (int64_t t = 0; t < index; t++) before += (call->tables[t].ids + 2) * arrays_of(call->tables[t].order);
  int64_t* keys = room.keys.at<int64_t>() + base + 2 * index;
  Arrays arrays{room.arrays.at<int32_t>() + before, table.ids + 2};
  int32_t* perm = arrays.take();
  table.keys = keys, table.perm = perm, table.mirrored = 0;
  for (int64_t l = 0; l < table.order; l++) {
    Level& level = table.level[l];
    for (const int32_t** array : {&level.parent, &level.first, &level.digit, &level.group, &level.by_digit,
                                  &level.run_start, &level.run_group, &level.run_below,
                                  &level.piece_start, &level.slice_node, &level.slice_run, &level.slice_piece})
      *array = arrays.take();
  }
  with_records(table, records_of(room, index, base), [&](auto* a) {
    auto* sorted = static_cast<decltype(a)>(table.sorted);
    grow_tree(table, sorted ? sorted : sort_keys(call, table, straight, a, a + table.ids), keys, perm);
    if (!mirror_is_cheaper(table, keys, room.scratch_of(thread))) return;
    table.mirrored = 1;
    grow_tree(table, sort_keys(call, table, Mirror{*table.code}, a, a + table.ids), keys, perm);
  });
  table.sorted = nullptr;  // the tree has taken the records' memory
  cut_slices(table, table.code->plan == FORWARD ? call->slice_rows : table.ids);
}

void plan_level(const Call* call, int64_t index, int64_t base, int64_t l, const PlanRoom& room) {
  Table& table = call->tables[index];
  if (l == 0 || l >= table.order) return;
  Narrow* records = reinterpret_cast<Narrow*>(records_of(room, index, base)) + 2 * (l - 1) * (table.ids + 2);
  group_level(table.level[l], table.slices, radix_of(table, l), records, records + table.level[l].nodes);
}

}  // namespace recemb
