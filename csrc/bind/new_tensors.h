// New tensors for results, made by torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "bind/tensors.h"

namespace fused_rnn {

// A tensor that the kernels can read as it is, and what keeps its memory alive.
struct Operand {
  py::object owner;
  Tensor tensor;
  explicit operator bool() const { return static_cast<bool>(owner); }
};

// Smaller tensors are torch's alone.
constexpr double kKeptBytes = 256 << 10;

inline bool is_small(const Tensor& tensor) {
  return static_cast<double>(dtype_bytes(tensor.dtype())) * static_cast<double>(tensor.size()) < kKeptBytes;
}

[[noreturn]] inline void refuse_new() {
  throw std::runtime_error("expected a new tensor of torch.empty's kind, got another from a mode or a patched torch");
}

// What makes new tensors and results of them, looked up once.
struct Makers {
  py::object empty, empty_like, float32, layer_result;
  py::str new_empty_strided = "new_empty_strided", transpose = "transpose_", dtype = "dtype", device = "device";

  Makers() {
    const py::module_ torch = py::module_::import("torch");
    empty = py::module_::import("fused_rnn.kernels.memory").attr("empty");
    empty_like = torch.attr("empty_like");
    layer_result = py::module_::import("fused_rnn.kernels.protocol").attr("LayerResult");
    float32 = torch.attr("float32");
  }
  static const Makers& get() {
    // Never freed: the interpreter may be gone by the time that statics are.
    static const Makers* makers = new Makers();
    return *makers;
  }
};

// What was made, if it has this dtype, these sizes and strides: whoever intercepts torch's functions may have made something
// else of it. An axis of one index, and a tensor without elements, may have any strides.
inline Operand made(py::object owner, Dtype dtype, const Index* sizes, const Index* strides, int dimensions) {
  Operand operand{std::move(owner), {}};
  operand.tensor = Tensor(operand.owner);
  const Tensor& tensor = operand.tensor;
  bool fits = tensor.dtype() == dtype && tensor.dimensions() == dimensions;
  for (int i = 0; fits && i < dimensions; ++i) {
    fits = tensor.shape(i) == sizes[i] && (sizes[i] <= 1 || !tensor.size() || tensor.stride(i) == strides[i]);
  }
  if (!fits) refuse_new();
  return operand;
}

inline py::object new_strided(py::handle like, const Index* sizes, const Index* strides, int dimensions) {
  py::tuple shape(static_cast<std::size_t>(dimensions)), steps(static_cast<std::size_t>(dimensions));
  for (int i = 0; i < dimensions; ++i) {
    PyTuple_SET_ITEM(shape.ptr(), i, PyLong_FromSsize_t(sizes[i]));
    PyTuple_SET_ITEM(steps.ptr(), i, PyLong_FromSsize_t(strides[i]));
  }
  // Of torch's ways to make a tensor this takes the shortest, half of `new_empty`.
  PyObject* arguments[] = {like.ptr(), shape.ptr(), steps.ptr()};
  PyObject* result = PyObject_VectorcallMethod(Makers::get().new_empty_strided.ptr(), arguments, 3, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// A new contiguous tensor on the CPU, written by the kernels; None where it is not wanted. Its dtype is that of `like`, or
// float32 in place of a narrower one.
inline Operand new_tensor(bool wanted, py::handle like, Dtype like_dtype, Dtype dtype, std::initializer_list<Index> sizes) {
  if (!wanted) return {};
  const int dimensions = static_cast<int>(sizes.size());
  Index strides[Tensor::kMostDimensions];
  double bytes = static_cast<double>(dtype_bytes(dtype));
  for (int i = dimensions; i-- > 0;) {
    strides[i] = i + 1 < dimensions ? strides[i + 1] * std::max<Index>(1, sizes.begin()[i + 1]) : 1;
    bytes *= static_cast<double>(sizes.begin()[i]);
  }
  const bool widened = dtype != like_dtype;
  if (bytes < kKeptBytes && !widened)
    return made(new_strided(like, sizes.begin(), strides, dimensions), dtype, sizes.begin(), strides, dimensions);
  const Makers& makers = Makers::get();
  py::tuple shape(sizes.size());
  for (int i = 0; i < dimensions; ++i) shape[static_cast<std::size_t>(i)] = sizes.begin()[i];
  const py::object kind = widened ? makers.float32 : py::object(like.attr(makers.dtype));
  return made(makers.empty(shape, kind, like.attr(makers.device)), dtype, sizes.begin(), strides, dimensions);
}

// A new tensor of the dtype and the sizes of another, which has the strides of a new one; both small.
inline Operand new_alike(const Operand& other) {
  PyObject* result = PyObject_CallOneArg(Makers::get().empty_like.ptr(), other.owner.ptr());
  if (!result) throw py::error_already_set();
  const Tensor& tensor = other.tensor;
  return made(py::reinterpret_steal<py::object>(result), tensor.dtype(), tensor.sizes(), tensor.strides(), tensor.dimensions());
}

// As new_tensor, in the dtype of `like`; where another tensor is what is asked for, it is made like that: torch is told less.
inline Operand new_tensor(bool wanted, const Operand& other, py::handle like, Dtype dtype, std::initializer_list<Index> sizes) {
  if (wanted && other && other.tensor.dtype() == dtype && other.tensor.is_dense(sizes) && is_small(other.tensor) &&
      Tensor::is_plain(other.owner)) {
    return new_alike(other);
  }
  return new_tensor(wanted, like, dtype, dtype, sizes);
}

// A new tensor (T, N, columns) that Python sees as (N, T, columns), in the dtype of `like`: not as a view, because autograd
// lets nobody change one that was made below it.
inline Operand new_turned(py::handle like, Dtype dtype, Index length, Index batch, Index columns) {
  const Index shape[] = {batch, length, columns}, strides[] = {columns, batch * columns, 1};
  py::object turned;
  if (static_cast<double>(dtype_bytes(dtype) * length) * static_cast<double>(batch * columns) >= kKeptBytes) {
    turned = new_tensor(true, like, dtype, dtype, {length, batch, columns}).owner;
    turned.attr(Makers::get().transpose)(0, 1);
  } else {
    turned = new_strided(like, shape, strides, 3);
  }
  return made(std::move(turned), dtype, shape, strides, 3);
}

}  // namespace fused_rnn
