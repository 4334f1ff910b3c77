// From torch's tensors to checked pointers: whatever is wrong with a call is raised here, before a kernel runs.
//
// torch is not needed to build this: a tensor is read through DLPack's table of functions, or where torch is too old for it or
// the tensor is of a class of its own, it is asked for its data_ptr(), dtype, shape and stride() as Python would. Both leave no
// mark on it: Tensor.numpy() forbids for good that the tensor's storage is resized, as torch.distributed's fully_shard does
// with a gathered parameter.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bind/dlpack.h"
#include "walk/args.h"

namespace fused_rnn {

namespace py = pybind11;
using Shape = std::vector<Index>;

[[noreturn]] inline void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

inline std::string text(const Shape& shape) {
  std::string s = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

// A named tuple as the tuple that it is: its items are otherwise found by a call of Python's.
inline py::tuple as_tuple(py::handle sequence) {
  return PyTuple_Check(sequence.ptr()) ? py::reinterpret_borrow<py::tuple>(sequence)
                                       : py::tuple(py::reinterpret_borrow<py::object>(sequence));
}

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kInt64, kBool, kInt32, kInt8, kOther };

template <class T>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<T, float>) return Dtype::kFloat32;
  if constexpr (std::is_same_v<T, double>) return Dtype::kFloat64;
  if constexpr (std::is_same_v<T, BFloat16>) return Dtype::kBFloat16;
  if constexpr (std::is_same_v<T, Float16>) return Dtype::kFloat16;
  if constexpr (std::is_same_v<T, std::int64_t>) return Dtype::kInt64;
  if constexpr (std::is_same_v<T, bool>) return Dtype::kBool;
  if constexpr (std::is_same_v<T, std::int32_t>) return Dtype::kInt32;
  if constexpr (std::is_same_v<T, std::int8_t>) return Dtype::kInt8;
}

inline const char* dtype_name(Dtype dtype) {
  constexpr const char* names[] = {"torch.float32", "torch.float64", "torch.bfloat16", "torch.float16", "torch.int64",
                                   "torch.bool",    "torch.int32",   "torch.int8",     "another"};
  return names[static_cast<int>(dtype)];
}

inline Index dtype_bytes(Dtype dtype) {
  constexpr Index bytes[] = {4, 8, 2, 2, 8, 1, 4, 1, 0};
  return bytes[static_cast<int>(dtype)];
}

// What a tensor on the CPU says of itself. It borrows: whoever made it keeps the tensor alive.
class Tensor {
 public:
  static constexpr int kMostDimensions = 3;

  Tensor() = default;

  explicit Tensor(py::handle tensor) {
    const Names& names = Names::get();
    if (!read(names, tensor)) ask(names, tensor);
    if (!data_ && size()) {
      throw std::runtime_error("expected a tensor with memory of its own, got a " +
                               std::string(Py_TYPE(tensor.ptr())->tp_name) +
                               " without: it is sharded, freed or wraps other tensors. A model under fully_shard has its "
                               "weights only while it is called as a whole.");
    }
  }

  // Whether the memory holds the numbers with the other sign, as that of z.conj().imag does.
  static bool is_negated(py::handle tensor) {
    const Names& names = Names::get();
    if (!names.negated || !is_plain(tensor)) return method(tensor, names.is_neg).ptr() == Py_True;
    PyObject* result = names.negated(tensor.ptr(), nullptr);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result).ptr() == Py_True;
  }

  // Whether an object is a torch.Tensor or a torch.nn.Parameter, and not of a class derived from them.
  static bool is_plain(py::handle object) {
    const Names& names = Names::get();
    const void* type = Py_TYPE(object.ptr());
    return type == names.tensor.ptr() || type == names.parameter.ptr();
  }

  Dtype dtype() const { return dtype_; }
  int dimensions() const { return dimensions_; }
  Index shape(int axis) const { return shape_[axis]; }
  // Elements from one index of an axis to the next.
  Index stride(int axis) const { return strides_[axis]; }
  const Index* sizes() const { return shape_.data(); }
  const Index* strides() const { return strides_.data(); }
  Shape shape() const { return Shape(shape_.begin(), shape_.begin() + dimensions_); }
  Index size() const {
    Index product = 1;
    for (int i = 0; i < dimensions_; ++i) product *= shape_[i];
    return product;
  }
  // A tensor without elements may have any strides.
  bool contiguous() const {
    if (!size()) return true;
    Index expected = 1;
    for (int i = dimensions_; i-- > 0;) {
      if (shape_[i] > 1 && strides_[i] != expected) return false;
      expected *= shape_[i];
    }
    return true;
  }
  // Whether it has these sizes, and the strides that torch gives a new tensor of them: also to an axis of one index.
  bool is_dense(std::initializer_list<Index> sizes) const {
    if (dimensions_ != static_cast<int>(sizes.size())) return false;
    Index expected = 1;
    for (int i = dimensions_; i-- > 0;) {
      if (shape_[i] != sizes.begin()[i] || strides_[i] != expected) return false;
      expected *= std::max<Index>(1, shape_[i]);
    }
    return true;
  }
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  // What is asked of every tensor, looked up once.
  struct Names {
    py::str is_cpu = intern("is_cpu"), is_neg = intern("is_neg"), dtype = intern("dtype"), shape = intern("shape"),
            stride = intern("stride"), data_ptr = intern("data_ptr");
    py::object tensor, parameter;
    std::array<py::object, static_cast<std::size_t>(Dtype::kOther)> dtypes;
    // What is_neg of a plain tensor calls, where that is a function of C without arguments.
    PyCFunction negated = nullptr;
    const dlpack::Exchange* exchange = nullptr;

    Names() {
      const py::module_ torch = py::module_::import("torch");
      tensor = torch.attr("Tensor");
      parameter = torch.attr("nn").attr("Parameter");
      dtypes = {torch.attr("float32"), torch.attr("float64"), torch.attr("bfloat16"), torch.attr("float16"),
                torch.attr("int64"),   torch.attr("bool"),    torch.attr("int32"),    torch.attr("int8")};
      const py::object method = tensor.attr(is_neg);
      if (Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type)) {
        const PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
        if (def->ml_flags == METH_NOARGS) negated = def->ml_meth;
      }
      const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
      if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return;
      const auto* table = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
      if (table->version.major == dlpack::kMajorVersion && table->read) exchange = table;
    }
    static py::str intern(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }
    static const Names& get() {
      // Never freed: the interpreter may be gone by the time that statics are.
      static const Names* names = new Names();
      return *names;
    }
  };

  // Through DLPack's table; false where that does not apply, or has no answer.
  bool read(const Names& names, py::handle tensor) {
    if (!names.exchange || !is_plain(tensor)) return false;
    dlpack::Tensor view;
    if (names.exchange->read(tensor.ptr(), &view) != 0) {
      PyErr_Clear();
      return false;
    }
    if (view.device_type != dlpack::kCpu || view.dimensions > kMostDimensions) return false;
    dimensions_ = view.dimensions;
    Index stride = 1;
    for (int i = dimensions_; i-- > 0;) {
      shape_[i] = view.shape[i];
      strides_[i] = view.strides ? view.strides[i] : stride;
      stride *= shape_[i];
    }
    const auto is = [&](std::uint8_t code, int bits) { return view.dtype.code == code && view.dtype.bits == bits; };
    dtype_ = view.dtype.lanes != 1     ? Dtype::kOther
             : is(dlpack::kFloat, 32)  ? Dtype::kFloat32
             : is(dlpack::kFloat, 64)  ? Dtype::kFloat64
             : is(dlpack::kBfloat, 16) ? Dtype::kBFloat16
             : is(dlpack::kFloat, 16)  ? Dtype::kFloat16
             : is(dlpack::kInt, 64)    ? Dtype::kInt64
             : is(dlpack::kBool, 8)    ? Dtype::kBool
             : is(dlpack::kInt, 32)    ? Dtype::kInt32
             : is(dlpack::kInt, 8)     ? Dtype::kInt8
                                       : Dtype::kOther;
    data_ = view.data ? static_cast<char*>(view.data) + view.byte_offset : nullptr;
    return true;
  }

  // Through the tensor's own attributes and methods.
  void ask(const Names& names, py::handle tensor) {
    if (!tensor.attr(names.is_cpu).cast<bool>()) throw py::value_error("expected a tensor on the CPU, got one elsewhere");
    const py::object dtype = tensor.attr(names.dtype);
    for (int i = 0; i < static_cast<int>(Dtype::kOther); ++i) {
      if (dtype.is(names.dtypes[i])) dtype_ = static_cast<Dtype>(i);
    }
    const py::tuple shape = tensor.attr(names.shape), strides = method(tensor, names.stride);
    dimensions_ = static_cast<int>(shape.size());
    if (dimensions_ > kMostDimensions) throw py::value_error("expected at most 3 dimensions, got more");
    for (int i = 0; i < dimensions_; ++i) {
      shape_[i] = shape[i].cast<Index>();
      strides_[i] = strides[i].cast<Index>();
    }
    data_ = reinterpret_cast<void*>(method(tensor, names.data_ptr).cast<std::uintptr_t>());
  }

  static py::object method(py::handle object, const py::str& name) {
    PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), name.ptr());
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  void* data_ = nullptr;
  Dtype dtype_ = Dtype::kOther;
  int dimensions_ = 0;
  std::array<Index, kMostDimensions> shape_{}, strides_{};
};

inline std::string text(const Tensor& tensor) { return text(tensor.shape()); }

inline void check_dimensions(const std::string& name, const Tensor& tensor, int dimensions) {
  if (tensor.dimensions() != dimensions) refuse(name, std::to_string(dimensions) + " dimensions", text(tensor));
}

}  // namespace fused_rnn
