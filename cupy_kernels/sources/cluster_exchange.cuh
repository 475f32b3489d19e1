// Messages between the blocks of threads of a cluster. Needs device.cuh.

constexpr int kMaxClusterSize = 8;

struct Message {
  uint64 first, second;
};

// In shared memory. Two boxes take turns: who writes into one has passed the barrier that all
// reached after they had read it.
struct Inboxes {
  Message messages[2][kMaxClusterSize];
};

// Calls visit(message) for each of the cluster's.
template <class Visit>
__device__ __forceinline__ void for_each_message(const Message* messages, Visit visit) {
  const int size = cluster_size();
#pragma unroll
  for (int rank = 0; rank < kMaxClusterSize; rank++) {
    if (rank < size) visit(messages[rank]);
  }
}

class Exchange {
 public:
  // All blocks of the cluster have started when this returns.
  __device__ explicit Exchange(Inboxes& inboxes) : inboxes_(inboxes), turn_(0) {
    cluster_sync();
  }

  // Everybody's message, by rank, until the next but one is sent. All threads call it, the first
  // warp's message counts; what was written into shared memory before is visible to the whole
  // cluster then.
  __device__ const Message* all(const Message& message) {
    Message* box = inboxes_.messages[turn_];
    if (threadIdx.x < cluster_size()) *in_block(box + cluster_rank(), threadIdx.x) = message;
    turn_ ^= 1;
    cluster_sync();
    return box;
  }

 private:
  Inboxes& inboxes_;
  int turn_;
};
