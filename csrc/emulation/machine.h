// A grid of thread blocks on the host: what the emulated device's instructions are made of.
//
// Every thread of a block is a fiber; blocks run one after the other in a random order, fibers are
// picked at random by a seed. What a device would leave undefined is made visible:
//
// - shared memory starts as NaN (0xFF in every byte), and every access is checked for bounds,
//   alignment and copies still in flight;
// - global memory is what was registered (Memory): reads and writes outside, writes to inputs and
//   second writes to the same output byte are errors;
// - an asynchronous copy lands as late as its wait allows, as early as it may, or at random;
// - lanes of a warp that meet at different warp-wide instructions, and deadlocks, are reported by
//   name.
//
// An error is recorded once and ends the launch with std::runtime_error.
//
// An instruction at which threads meet is a Block::meet; one that is waited for through a condition
// posts its completion (Block::post) and waits with Block::wait_until; state of its own lives in
// Block::extension. Memory is reached through Block::shared_* and Block::global alone.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <typeindex>
#include <vector>

#include "faults.h"

namespace wf::emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

enum class Completion { kLate, kEarly, kRandom };

// The same schedule on every machine for a seed.
class Random {
 public:
  explicit Random(uint64_t seed) : numbers_(seed) {}
  size_t below(size_t n) { return numbers_() % n; }

 private:
  std::mt19937_64 numbers_;
};

// Global memory that a launch may touch, registered by address before it.
class Memory {
 public:
  struct Region {
    uintptr_t begin, end;
    bool writable;
    std::string name;
    std::vector<uint8_t> written;  // per byte, for outputs
  };

  void add(uintptr_t begin, size_t bytes, bool writable, std::string name) {
    regions_.push_back({begin, begin + bytes, writable, std::move(name),
                        std::vector<uint8_t>(writable ? bytes : 0)});
  }
  void clear() { regions_.clear(), last_ = 0; }
  void forget_writes() {
    for (Region& region : regions_) region.written.assign(region.written.size(), 0);
  }

  // Empty if the access is allowed, else what is wrong with it.
  std::string check(const void* pointer, size_t bytes, bool write, const char* what) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    if (at % bytes != 0 && bytes <= 16)
      return std::string(what) + ": global address is not aligned to " + std::to_string(bytes);
    for (size_t i = 0; i < regions_.size(); ++i) {
      // An input may share memory with an output: a write looks for the writable registration.
      const size_t candidate = (last_ + i) % regions_.size();
      Region& region = regions_[candidate];
      if (at < region.begin || at + bytes > region.end || (write && !region.writable)) continue;
      last_ = candidate;
      if (write)
        for (size_t byte = at - region.begin; byte < at - region.begin + bytes; ++byte)
          if (region.written[byte]++)
            return std::string(what) + ": byte " + std::to_string(byte) + " of " + region.name +
                   " is written twice";
      return {};
    }
    return std::string(what) + (write ? ": write" : ": read") + " of " + std::to_string(bytes) +
           " bytes outside of registered global memory";
  }

 private:
  std::vector<Region> regions_;
  size_t last_ = 0;
};

struct Launch {
  uint32_t grid = 1;
  int threads = 32;
  uint32_t shared_bytes = 0;
  Completion completion = Completion::kLate;
};

class Block;
struct Rendezvous;

struct Fiber {
  enum class State { kNew, kRunnable, kWaiting, kDone };
  Block* block = nullptr;
  int thread = 0;
  State state = State::kNew;
  const char* waits_at = "";
  std::function<bool()> condition;  // set while in wait_until
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf context;

  int lane() const { return thread % kWarp; }
  Rendezvous& warp();
};

inline Fiber*& running() {
  static Fiber* fiber = nullptr;
  return fiber;
}
inline Fiber* current_fiber() { return running(); }

// A meeting point of a fixed number of threads.
struct Rendezvous {
  const char* what = nullptr;
  int expected = 0;
  std::vector<void*> arguments;  // in order of arrival
  std::vector<Fiber*> waiting;
};

class Block {
 public:
  Block(const Launch& launch, Memory& memory, Random& random)
      : launch_(launch), memory_(memory), random_(random) {
    if (launch.threads % kWarp != 0)
      throw std::runtime_error("a block needs whole warps, not " + std::to_string(launch.threads) +
                               " threads");
    fibers_.resize(launch.threads);
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStackBytes]);
    // 1024-byte alignment, as swizzled TMA tiles need it.
    shared_storage_.resize(launch.shared_bytes + 1024);
    shared_ = shared_storage_.data() +
              (1024 - reinterpret_cast<uintptr_t>(shared_storage_.data()) % 1024) % 1024;
  }

  void run(uint32_t index, const std::function<void()>& kernel) {
    index_ = index;
    kernel_ = &kernel;
    error_.clear();
    std::memset(shared_, 0xFF, launch_.shared_bytes);
    copies_in_flight_.assign((launch_.shared_bytes + 3) / 4, 0);
    warps_.assign(launch_.threads / kWarp, Rendezvous{});
    barriers_.assign(16, Rendezvous{});
    posted_.clear(), extensions_.clear();
    runnable_.clear();
    for (int thread = 0; thread < launch_.threads; ++thread) {
      Fiber& fiber = fibers_[thread];
      fiber.block = this, fiber.thread = thread, fiber.state = Fiber::State::kNew;
      fiber.condition = nullptr;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStackBytes;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, &Block::enter, 0);
      runnable_.push_back(&fiber);
    }
    int alive = launch_.threads;
    while (alive > 0 && error_.empty()) {
      maybe_complete();
      if (runnable_.empty() && !unblock()) break;
      const size_t pick = random_.below(runnable_.size());
      Fiber* fiber = runnable_[pick];
      runnable_[pick] = runnable_.back();
      runnable_.pop_back();
      resume(fiber);
      alive -= fiber->state == Fiber::State::kDone;
    }
    if (error_.empty() && alive > 0) error_ = "deadlock: " + who_waits();
    if (error_.empty() && !posted_.empty())
      error_ = "the block ended with " + std::to_string(posted_.size()) + " copies in flight";
    if (!error_.empty()) throw std::runtime_error("block " + std::to_string(index) + ": " + error_);
  }

  // Whether threads [first, first + count) have all returned.
  bool ended(int first, int count) const {
    for (int i = first; i < first + count; ++i)
      if (fibers_[i].state != Fiber::State::kDone) return false;
    return true;
  }

  // --- what primitives are made of -------------------------------------------------------------

  uint32_t index() const { return index_; }
  const Launch& launch() const { return launch_; }
  Random& random() { return random_; }
  std::vector<Rendezvous>& barriers() { return barriers_; }
  std::vector<Rendezvous>& warps() { return warps_; }

  // Ends the launch with this message; does not return.
  [[noreturn]] void fail(const std::string& message) {
    if (running() == nullptr)  // a posted completion, run by the scheduler itself
      throw std::runtime_error("block " + std::to_string(index_) + ": " + message);
    error_ = "thread " + std::to_string(running()->thread) + ": " + message;
    _longjmp(scheduler_, 1);  // a fiber holds nothing that needs a destructor
  }

  // Blocks until `expected` threads are here; the last one calls complete(arguments by rank).
  template <class Complete>
  void meet(Rendezvous& at, const char* what, int expected, int rank, void* argument,
                   Complete complete) {
    Fiber* self = running();
    if (at.arguments.empty()) at.what = what, at.expected = expected, at.arguments.reserve(expected);
    if (at.what != what && std::strcmp(at.what, what) != 0)
      fail(std::string("is at ") + what + " while others of its group are at " + at.what);
    if (at.expected != expected)
      fail(std::string(what) + ": " + std::to_string(expected) + " threads expected here, " +
           std::to_string(at.expected) + " by others");
    struct Entry {
      int rank;
      void* argument;
    };
    Entry mine{rank, argument};  // on this fiber's stack, which lives on while it waits
    at.arguments.push_back(&mine);
    at.waiting.push_back(self);
    self->waits_at = what;
    if (static_cast<int>(at.arguments.size()) == expected) {
      std::vector<void*> by_rank(expected, nullptr);
      for (void* other : at.arguments) {
        const Entry* entry = static_cast<const Entry*>(other);  // null: a thread that only arrived
        if (entry != nullptr && entry->rank < expected) by_rank[entry->rank] = entry->argument;
      }
      complete(by_rank.data());
      release(at, self);
      return;
    }
    self->state = Fiber::State::kWaiting;
    yield(self);
  }

  // Counts as one of the `expected` threads of a barrier without waiting (bar.arrive).
  void arrive(Rendezvous& at, const char* what, int expected) {
    if (at.arguments.empty()) at.what = what, at.expected = expected;
    if (at.expected != expected) fail(std::string(what) + ": thread counts differ");
    at.arguments.push_back(nullptr);
    if (static_cast<int>(at.arguments.size()) == expected) {
      release(at, nullptr);
    }
  }

  void wait_until(const char* what, std::function<bool()> condition) {
    if (condition()) return;
    Fiber* self = running();
    self->waits_at = what;
    self->condition = std::move(condition);
    self->state = Fiber::State::kWaiting;
    yield(self);
  }

  void post(std::function<void()> completion) { posted_.push_back(std::move(completion)); }

  // One object per block and type, for primitives with a state of their own.
  template <class State>
  State& extension() {
    std::shared_ptr<void>& slot = extensions_[std::type_index(typeid(State))];
    if (!slot) slot = std::make_shared<State>();
    return *static_cast<State*>(slot.get());
  }

  // Bounds-checked view of shared memory, for bulk work such as TMA boxes.
  char* shared_span(uint32_t address, uint32_t bytes, const char* what) {
    if (address > launch_.shared_bytes || bytes > launch_.shared_bytes - address)
      fail(std::string(what) + ": shared bytes [" + std::to_string(address) + ", " +
           std::to_string(uint64_t{address} + bytes) + ") of " +
           std::to_string(launch_.shared_bytes));
    return shared_ + address;
  }
  void shared_read(uint32_t address, void* into, uint32_t bytes, const char* what) {
    std::memcpy(into, access(address, bytes, what), bytes);
  }
  void shared_write(uint32_t address, const void* from, uint32_t bytes, const char* what) {
    std::memcpy(access(address, bytes, what), from, bytes);
  }
  // A copy into these bytes begins (its destination may not be touched) or ends.
  void begin_write(uint32_t address, uint32_t bytes, const char* what) {
    access(address, bytes, what);
    for (uint32_t word = address / 4; word < (address + bytes + 3) / 4; ++word)
      ++copies_in_flight_[word];
  }
  void end_write(uint32_t address, uint32_t bytes) {
    for (uint32_t word = address / 4; word < (address + bytes + 3) / 4; ++word)
      --copies_in_flight_[word];
  }

  void global(const void* pointer, size_t bytes, bool write, const char* what) {
    const std::string wrong = memory_.check(pointer, bytes, write, what);
    if (!wrong.empty()) fail(wrong);
  }

 private:
  // All but `self`, which runs, go on.
  void release(Rendezvous& at, const Fiber* self) {
    for (Fiber* fiber : at.waiting)
      if (fiber != self) {
        fiber->state = Fiber::State::kRunnable;
        runnable_.push_back(fiber);
      }
    at.arguments.clear(), at.waiting.clear();
  }

  // noinline: no frame of these may hold a register across the switch. ucontext makes a fiber's first
  // frame; from then on _setjmp/_longjmp switch without a system call.
  __attribute__((noinline)) void resume(Fiber* fiber) {
    const bool fresh = fiber->state == Fiber::State::kNew;
    fiber->state = Fiber::State::kRunnable;
    running() = fiber;
    if (_setjmp(scheduler_) == 0) {
      if (fresh) setcontext(&fiber->start);
      _longjmp(fiber->context, 1);
    }
    running() = nullptr;
  }

  __attribute__((noinline)) void yield(Fiber* fiber) {
    if (_setjmp(fiber->context) == 0) _longjmp(scheduler_, 1);
  }

  static void enter() {
    Fiber* fiber = running();
    Block* block = fiber->block;
    (*block->kernel_)();
    fiber->state = Fiber::State::kDone;
    _longjmp(block->scheduler_, 1);
  }

  char* access(uint32_t address, uint32_t bytes, const char* what) {
    char* pointer = shared_span(address, bytes, what);
    if (address % bytes != 0)
      fail(std::string(what) + ": shared address " + std::to_string(address) + " is not aligned to " +
           std::to_string(bytes));
    for (uint32_t word = address / 4; word < (address + bytes + 3) / 4; ++word)
      if (copies_in_flight_[word] > 0)
        fail(std::string(what) + ": shared byte " + std::to_string(word * 4) +
             " has an asynchronous copy in flight");
    return pointer;
  }

  // Posted completions: now and then by themselves, as the policy says.
  void maybe_complete() {
    if (posted_.empty() || launch_.completion == Completion::kLate) return;
    if (launch_.completion == Completion::kEarly || random_.below(4) == 0) {
      complete_one();
      unblock_conditions();
    }
  }
  void complete_one() {
    const size_t pick = random_.below(posted_.size());
    std::function<void()> completion = std::move(posted_[pick]);
    posted_.erase(posted_.begin() + pick);
    completion();
  }
  bool unblock_conditions() {
    bool any = false;
    for (Fiber& fiber : fibers_)
      if (fiber.condition && fiber.condition()) {
        fiber.condition = nullptr;
        fiber.state = Fiber::State::kRunnable;
        runnable_.push_back(&fiber);
        any = true;
      }
    return any;
  }
  bool unblock() {
    while (!unblock_conditions()) {
      if (posted_.empty()) return false;
      complete_one();
      if (!error_.empty()) return false;
    }
    return true;
  }
  std::string who_waits() const {
    std::map<std::string, std::vector<int>> places;
    for (const Fiber& fiber : fibers_)
      if (fiber.state == Fiber::State::kWaiting) places[fiber.waits_at].push_back(fiber.thread);
    std::string text;
    for (const auto& [place, threads] : places)
      text += (text.empty() ? "" : "; ") + std::to_string(threads.size()) + " threads (first " +
              std::to_string(threads[0]) + ") wait at " + place;
    return text;
  }

  const Launch& launch_;
  Memory& memory_;
  Random& random_;
  uint32_t index_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> runnable_;
  std::vector<char> shared_storage_;
  char* shared_ = nullptr;
  std::vector<int16_t> copies_in_flight_;  // by word
  std::vector<Rendezvous> warps_;
  std::vector<Rendezvous> barriers_;
  std::vector<std::function<void()>> posted_;
  std::map<std::type_index, std::shared_ptr<void>> extensions_;
  jmp_buf scheduler_;
};

inline Block& block() { return *running()->block; }
inline Rendezvous& Fiber::warp() { return block->warps()[thread / kWarp]; }

// The host's device: registered memory, how to run the next launches, and what to leave out.
struct Device {
  Memory memory;
  uint64_t seed = 0;
  Completion completion = Completion::kLate;
  Fault broken = Fault::kNone;

  void run(uint32_t grid, int threads, uint32_t shared_bytes, const std::function<void()>& kernel) {
    Launch launch{grid, threads, shared_bytes, completion};
    Random random(seed + 1);
    memory.forget_writes();
    Block block(launch, memory, random);
    std::vector<uint32_t> order(grid);
    for (uint32_t i = 0; i < grid; ++i) order[i] = i;
    for (uint32_t i = grid; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    for (uint32_t index : order) block.run(index, kernel);
  }
};

inline Device& device() {
  static Device instance;
  return instance;
}

}  // namespace wf::emulation
