// Alone's choices where backwards take what a test says, in place of seconds.
#include "recemb_parts.h"

// Fills ways[k] with the way of the k-th of `steps` backwards, 1 alone: of a table of so many parts, whose ids take
// seconds[k][way].
extern "C" void recemb_test_alone(int64_t parts, int64_t steps, const int32_t* threads, const double (*seconds)[2],
                                  int32_t* ways) {
  static recemb::Alone alone;
  alone = recemb::Alone();
  recemb::Table table{};
  table.parts = parts;
  recemb::Call call{};
  call.num_tables = 1;
  call.num_ids = 1000;
  call.tables = &table;
  for (int64_t k = 0; k < steps; k++) {
    alone.choose(&call, threads[k]);
    ways[k] = alone.now();
    alone.note(&call, seconds[k][ways[k]] * static_cast<double>(call.num_ids));
  }
}
