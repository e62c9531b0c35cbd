// What this machine can do at most: read memory, multiply int8, multiply float32. Compiled by machine.py at run time.
//
// Every thread does the same work; the result is how much work was done, in how much time on the wall and on the CPUs.
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define EACH(i) _Pragma("GCC unroll 32") for (int i = 0; i < ACCUMULATORS; i++)  // unrolled, or they live in memory
// The compiler would see that all accumulators are equal and keep one.
#define DISTINCT(acc) EACH(i) asm volatile("" : "+v"(acc[i]))
#if defined(__x86_64__)
#include <immintrin.h>
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define TARGET(isa) __attribute__((target(isa)))
#else
#define CLONES
#endif

namespace {

constexpr int ACCUMULATORS = 12;  // at least latency x ports of today's cores, and few enough for 16 registers
constexpr long ROUNDS = 4'000'000;
std::atomic<uint64_t> sink;  // keeps the compiler from dropping loops whose results nobody reads

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Runs work(thread) on all threads at once; wall and the sum of CPU times in seconds.
void run(int threads, const std::function<void(int)>& work, double* wall, double* cpu) {
  std::atomic<int> ready{0};
  std::vector<double> begin(threads), end(threads), busy(threads);
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; i++)
    pool.emplace_back([&, i] {
      ready++;
      while (ready < threads) std::this_thread::yield();
      const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
      begin[i] = seconds(CLOCK_MONOTONIC);
      work(i);
      end[i] = seconds(CLOCK_MONOTONIC);
      busy[i] = seconds(CLOCK_THREAD_CPUTIME_ID) - start;
    });
  for (auto& thread : pool) thread.join();
  double first = begin[0], last = end[0];
  *cpu = 0;
  for (int i = 0; i < threads; i++) {
    first = begin[i] < first ? begin[i] : first;
    last = end[i] > last ? end[i] : last;
    *cpu += busy[i];
  }
  *wall = last - first;
}

// ahead: bytes to prefetch, 0 for the hardware's own prefetching alone.
CLONES uint64_t sum(const uint64_t* data, size_t count, size_t ahead) {
  uint64_t lanes[32] = {};
  for (size_t i = 0; i + 32 <= count; i += 32) {
    if (ahead)
      for (int line = 0; line < 4; line++) __builtin_prefetch((const char*)(data + i) + ahead + 64 * line);
    for (int j = 0; j < 32; j++) lanes[j] += data[i + j];
  }
  uint64_t total = 0;
  for (uint64_t lane : lanes) total += lane;
  return total;
}

#if defined(__x86_64__)
TARGET("avx512f,avx512vnni") void vnni512() {
  __m512i acc[ACCUMULATORS] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  DISTINCT(acc);
  for (long i = 0; i < ROUNDS; i++)
    EACH(j) asm("vpdpbusd %2, %1, %0" : "+v"(acc[j]) : "v"(a), "v"(b));  // GCC 12 copies every one's result
  EACH(j) sink += uint64_t(_mm512_reduce_add_epi32(acc[j]));
}

// What a kernel does for 32 products where VNNI is missing; widening its int16 sums now and then is left out.
TARGET("avx2") void maddubs256() {
  __m256i acc[ACCUMULATORS] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  DISTINCT(acc);
  for (long i = 0; i < ROUNDS; i++)
    EACH(j) {
      __m256i products = _mm256_maddubs_epi16(a, b);
      asm volatile("" : "+x"(products));  // the operands never change: without this it would be computed once
      acc[j] = _mm256_add_epi16(acc[j], products);
    }
  EACH(j) sink += uint64_t(_mm256_extract_epi32(acc[j], 0));
}

TARGET("avx512f") void fma512() {
  __m512 acc[ACCUMULATORS] = {}, a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
  DISTINCT(acc);
  for (long i = 0; i < ROUNDS; i++)
    EACH(j) acc[j] = _mm512_fmadd_ps(acc[j], a, b);
  EACH(j) sink += uint64_t(_mm512_reduce_add_ps(acc[j]));
}

TARGET("avx2,fma") void fma256() {
  __m256 acc[ACCUMULATORS] = {}, a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
  DISTINCT(acc);
  for (long i = 0; i < ROUNDS; i++)
    EACH(j) acc[j] = _mm256_fmadd_ps(acc[j], a, b);
  EACH(j) sink += uint64_t(_mm256_cvtss_f32(acc[j]));
}
#endif

}  // namespace

extern "C" {

// Bytes read in all; pages of 2 MiB where huge != 0 and the system grants them.
double read_memory(int threads, long bytes, int huge, long ahead, int times, double* wall, double* cpu) {
  void* memory = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, size_t(bytes), huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  memset(memory, 1, size_t(bytes));
  const size_t part = size_t(bytes) / size_t(threads) / 256 * 256;
  for (int i = 0; i < times; i++)
    run(threads, [&](int t) { sink += sum((uint64_t*)((char*)memory + t * part), part / 8, size_t(ahead)); },
        wall + i, cpu + i);
  munmap(memory, size_t(bytes));
  return double(part) * threads;
}

// Operations (a multiply and an add are two) of all threads, 0 where this machine has no such unit; its name in *unit.
double multiply(int threads, int floats, const char** unit, double* wall, double* cpu) {
  *unit = "";
#if defined(__x86_64__)
  void (*work)() = nullptr;
  double lanes = 0;
  auto choose = [&](void (*function)(), double values, const char* name) {
    work = function, lanes = values, *unit = name;
  };
  if (floats) {
    if (__builtin_cpu_supports("avx512f")) choose(fma512, 16, "vfmadd, 512 bits");
    else if (__builtin_cpu_supports("fma")) choose(fma256, 8, "vfmadd, 256 bits");
  } else {
    if (__builtin_cpu_supports("avx512vnni")) choose(vnni512, 64, "vpdpbusd, 512 bits");
    else if (__builtin_cpu_supports("avx2")) choose(maddubs256, 32, "vpmaddubsw + vpaddw, 256 bits");
  }
  if (!work) return 0;
  run(threads, [&](int) { work(); }, wall, cpu);
  return 2.0 * lanes * ACCUMULATORS * double(ROUNDS) * threads;
#else
  return 0;
#endif
}
}
