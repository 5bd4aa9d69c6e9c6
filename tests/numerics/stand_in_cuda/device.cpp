// A CUDA device for a machine and a PyTorch without CUDA: its memory is the host's, its kernels are the CPU's.
//
// Tensors carry the device type, the dispatch keys and the storages of CUDA, so that a program takes the paths it takes
// on a GPU. An operator with tensors of two devices is refused, and what would make the host wait gives a warning. Times
// mean nothing here, and no CUDA kernel runs.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr auto kType = c10::DeviceType::CUDA;
thread_local c10::DeviceIndex current = 0;
std::atomic<int64_t> allocated{0}, peak{0};
std::atomic<bool> warns{false};

// --- Memory, device, streams ----------------------------------------------------------------------------------------

void count(int64_t bytes) {
  const int64_t now = allocated += bytes;
  for (int64_t seen = peak; now > seen && !peak.compare_exchange_weak(seen, now);) {
  }
}

struct Block {
  void* data;
  int64_t bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  count(-block->bytes);
  c10::free_cpu(block->data);
  delete block;
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kType, current);
    if (bytes == 0) return {nullptr, nullptr, &free_block, device};
    auto* block = new Block{c10::alloc_cpu(bytes), static_cast<int64_t>(bytes)};
    count(block->bytes);
    return {block->data, block, &free_block, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} device_memory;

std::mutex pinned_mutex;
std::set<const void*> pinned;

void free_pinned(void* data) {
  std::lock_guard<std::mutex> guard(pinned_mutex);
  pinned.erase(data);
  c10::free_cpu(data);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes ? bytes : 1);
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned.insert(data);
    return {data, data, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned_memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before(kType, current);
    current = device.index();
    return before;
  }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 8; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs = {}) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 8; }
  int getNumGPUs() const override { return 8; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Device getDeviceFromPtr(void*) const override { return {kType, current}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> guard(pinned_mutex);
    return pinned.count(data) > 0;
  }
};
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

void host_waits(const char* why) {
  if (warns) TORCH_WARN("called a synchronizing CUDA operation (", why, ")");
}

// --- One operator: the CPU's kernel over the same memory ------------------------------------------------------------

using Storages = std::vector<std::pair<c10::Storage, c10::Storage>>;  // of the host's view, of the device

struct Lent {
  c10::Storage storage;
  int64_t bytes;  // counted as the device's
};

void give_back(void* context) {
  auto* lent = static_cast<Lent*>(context);
  count(-lent->bytes);
  delete lent;
}

// The same memory as a storage of the other device.
c10::Storage over(const c10::Storage& storage, c10::Device device) {
  const bool to_device = device.type() == kType;
  auto* lent = new Lent{storage, to_device ? static_cast<int64_t>(storage.nbytes()) : 0};
  count(lent->bytes);
  c10::Allocator* allocator = to_device ? &device_memory : c10::GetCPUAllocator();
  c10::DataPtr data(storage.mutable_data(), lent, &give_back, device);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, /*resizable=*/true};
}

at::Tensor like(const at::Tensor& tensor, const c10::Storage& storage, c10::DispatchKey key) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), tensor.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  return out;
}

at::Tensor to_host(const at::Tensor& tensor, Storages& seen) {
  for (auto& [host, device] : seen)
    if (device.is_alias_of(tensor.storage())) return like(tensor, host, c10::DispatchKey::CPU);
  seen.emplace_back(over(tensor.storage(), c10::Device(c10::DeviceType::CPU)), tensor.storage());
  return like(tensor, seen.back().first, c10::DispatchKey::CPU);
}

at::Tensor to_device(const at::Tensor& tensor, Storages& seen) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  const auto storage = tensor.storage();
  for (auto& [host, device] : seen)
    if (host.is_alias_of(storage)) return like(tensor, device, c10::DispatchKey::CUDA);
  seen.emplace_back(storage, over(storage, c10::Device(kType, current)));
  return like(tensor, seen.back().second, c10::DispatchKey::CUDA);
}

// A value with every tensor in it replaced.
c10::IValue each(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& replace) {
  if (value.isTensor()) return replace(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorList()) list.push_back(replace(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      list.push_back(tensor ? std::optional<at::Tensor>(replace(*tensor)) : std::nullopt);
    return list;
  }
  if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<at::Tensor>> outer;
    for (const c10::IValue& inner : value.toListRef()) outer.push_back(each(inner, replace).toTensorList());
    return outer;
  }
  return value;
}

bool begins(const std::string& name, std::initializer_list<const char*> starts) {
  return std::any_of(starts.begin(), starts.end(), [&](const char* start) { return name.rfind(start, 0) == 0; });
}

// Where a tensor that was written to has become another, by resizing, its owner's becomes so too.
void take_over(const at::Tensor& given, const at::Tensor& host) {
  const bool moved = host.storage().data() != given.storage().data();
  if (!moved && host.sizes() == given.sizes() && host.strides() == given.strides()) return;
  auto* impl = given.unsafeGetTensorImpl();
  if (moved) impl->set_storage_keep_dtype(over(host.storage(), given.device()));
  impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& parameters = schema.arguments();
  const auto begin = stack->size() - parameters.size();
  const std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  const std::string name = schema.name();
  Storages seen;
  bool on_device = false, on_host = false;
  for (auto value = stack->begin() + begin; value != stack->end(); ++value) {
    *value = each(*value, [&](const at::Tensor& tensor) {
      if (tensor.defined() && tensor.is_cuda()) {
        on_device = true;
        return to_host(tensor, seen);
      }
      on_host |= tensor.defined() && tensor.dim() > 0;
      return tensor;
    });
    if (value->isDevice() && value->toDevice().type() == kType) *value = c10::Device(c10::DeviceType::CPU);
  }
  if (on_device && on_host && !begins(name, {"c10d::"})) {
    TORCH_CHECK(begins(name, {"aten::index", "aten::_index_put"}), "Expected all tensors to be on the same device, ",
                "but found at least two devices, cuda and cpu! (", name, ")");
    host_waits("indices on the host");
  }
  if (begins(name, {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique",
                    "aten::_unique"}))
    host_waits(name.c_str());

  const std::vector<c10::IValue> arguments(stack->begin() + begin, stack->end());
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }

  const auto& returns = schema.returns();
  for (size_t i = 0; i < returns.size(); ++i) {
    auto& value = (*stack)[stack->size() - returns.size() + i];
    const auto* written = returns[i].alias_info();
    if (!value.isTensor() || !written || !written->isWrite()) {
      value = each(value, [&](const at::Tensor& tensor) { return to_device(tensor, seen); });
      continue;
    }
    for (size_t j = 0; j < parameters.size(); ++j) {
      const auto* other = parameters[j].alias_info();
      if (!other || !other->isWrite() || other->beforeSets() != written->beforeSets()) continue;
      if (given[j].toTensor().is_cuda()) take_over(given[j].toTensor(), arguments[j].toTensor());
      value = given[j];
      break;
    }
  }
}

// --- What makes, shapes and moves tensors ----------------------------------------------------------------------------

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(at::Device(kType, current)));
  return at::detail::empty_generic_symint(size, &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(at::Device(kType, current)));
  return at::detail::empty_strided_symint_generic(size, stride, &device_memory, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.is_cuda() != source.is_cuda() && !non_blocking) host_waits("a copy between host and device");
  Storages seen;
  auto to = self.is_cuda() ? to_host(self, seen) : self;
  to.copy_(source.is_cuda() ? to_host(source, seen) : source);
  return self;
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  impl->set_sizes_contiguous(sizes);
  const auto bytes = at::detail::computeStorageNbytesContiguous(sizes, self.itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) {
    auto data = device_memory.allocate(bytes);
    if (self.storage().nbytes()) std::memcpy(data.get(), self.storage().data(), self.storage().nbytes());
    self.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    self.storage().unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  if (format) impl->empty_tensor_restride(*format);
  return self;
}

at::Tensor& set(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  const int64_t size = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set(self, std::move(storage), 0, c10::fromIntArrayRefSlow({size}), {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

void record_stream(at::Tensor&, at::Stream) {}

}  // namespace

namespace at::native {
Tensor view(const Tensor& self, IntArrayRef size);
Tensor as_strided_tensorimpl(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset);
}  // namespace at::native

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

const bool registered = [] {
  c10::SetAllocator(kType, &device_memory);
  return true;
}();

struct Silence final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
} silence;
c10::WarningHandler* const handler = c10::WarningUtils::get_warning_handler();
const bool replaces_silently = (c10::WarningUtils::set_warning_handler(&silence), true);

// gloo replaces NCCL, over the host's view of the same memory.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_", "allgather_", "_allgather_base_",
        "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "send", "recv_",
        "recv_any_source_", "barrier"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

const bool speaks_again = (c10::WarningUtils::set_warning_handler(handler), true);

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("record_stream", TORCH_FN(record_stream));
}

extern "C" {
void stand_in_set_device(int index) { current = static_cast<c10::DeviceIndex>(index); }
int stand_in_device() { return current; }
int64_t stand_in_memory() { return allocated; }
int64_t stand_in_peak() { return peak; }
void stand_in_reset_peak() { peak = allocated.load(); }
void stand_in_warn_of_waits(bool on) { warns = on; }
}
