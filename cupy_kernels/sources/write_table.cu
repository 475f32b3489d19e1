// Changes entries of the block table: all that a step's plan appends, begins and forks, at once.

#include "device.cuh"

// One entry, as the host lays it out.
struct alignas(8) TableEntry {
  int index;  // row * table_stride + place in the row
  int block_id;
};

struct WriteTableParams {
  const TableEntry* entries;  // [num_entries]; an index that stands twice has one block_id
  int* block_table;           // [max_rows, table_stride]
  int num_entries;
};

extern "C" __global__ void __launch_bounds__(256)
    write_table(const __grid_constant__ WriteTableParams p) {
  release_successor();
  wait_for_predecessor();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.num_entries) return;
  const TableEntry entry = p.entries[i];
  p.block_table[entry.index] = entry.block_id;
}
