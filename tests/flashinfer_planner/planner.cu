// FlashInfer's own planner of prefill launches, callable without its kernels.
#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

#include <flashinfer/attention/scheduler.cuh>

// Returns 0 and the 15 numbers of the plan in `out`, its arrays in `ints`; or 1 and why.
extern "C" int plan(int* qo_indptr, int* kv_indptr, int rows, int requests, int heads,
                    int kv_heads, int head_dim, int page, int graph, void* ints, long int_bytes,
                    long float_bytes, long* out, char* error, int error_bytes) {
  alignas(16) static char floats[16];
  std::vector<char> device(int_bytes);
  flashinfer::PrefillPlanInfo info;
  try {
    flashinfer::PrefillPlan<int>(floats, float_bytes, device.data(), ints, int_bytes, info,
                                 qo_indptr, kv_indptr, rows, requests, heads, kv_heads, head_dim,
                                 head_dim, page, graph, 2, -1, -1, false, 0, 0, nullptr);
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), error_bytes - 1);
    return 1;
  }
  const auto numbers = info.ToVector();
  std::copy(numbers.begin(), numbers.end(), out);
  return 0;
}
