// From Python's arrays to checked pointers: whatever is wrong with a call is raised here, before a kernel runs.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "args.h"

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

inline std::string text(const py::array& array) { return text(Shape(array.shape(), array.shape() + array.ndim())); }

template <class T>
void check_dtype(const std::string& name, const py::array& array) {
  if (!py::isinstance<py::array_t<T>>(array)) {
    refuse(name, "dtype " + std::string(py::str(py::dtype::of<T>())), std::string(py::str(array.dtype())));
  }
}

template <class T>
void check_shape(const std::string& name, const py::array& array, const Shape& shape) {
  check_dtype<T>(name, array);
  if (array.ndim() != static_cast<py::ssize_t>(shape.size()) || !std::equal(shape.begin(), shape.end(), array.shape())) {
    refuse(name, "shape " + text(shape), text(array));
  }
}

// Elements from one index of `axis` to the next.
template <class T>
Index stride(const std::string& name, const py::array& array, int axis) {
  const Index bytes = array.strides(axis);
  if (bytes < 0 || bytes % static_cast<Index>(sizeof(T))) {
    refuse(name, "strides of whole elements, not negative", std::to_string(bytes) + " bytes");
  }
  return bytes / static_cast<Index>(sizeof(T));
}

// What a const T asks of an array: to be readable; a T: to be writable.
template <class T>
T* pointer(const std::string& name, py::array& array) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(array.data());
  } else {
    if (!array.writeable()) refuse(name, "a writable array", "a read-only one");
    return static_cast<T*>(array.mutable_data());
  }
}

// A contiguous array of the given shape.
template <class T>
T* contiguous(const std::string& name, py::array& array, const Shape& shape) {
  check_shape<std::remove_const_t<T>>(name, array, shape);
  if (!(array.flags() & py::array::c_style)) refuse(name, "a contiguous array", "strides");
  return pointer<T>(name, array);
}

// (rows, D, columns) with contiguous columns.
template <class T>
Rows<T> rows(const std::string& name, py::array& array, Index count, Index recurrences, Index columns) {
  using Element = std::remove_const_t<T>;
  check_shape<Element>(name, array, {count, recurrences, columns});
  // An array without elements may have any strides.
  if (array.size() == 0) return {pointer<T>(name, array), columns * recurrences, columns};
  const Index row = stride<Element>(name, array, 0), recurrence = stride<Element>(name, array, 1);
  if (columns > 1 && stride<Element>(name, array, 2) != 1) refuse(name, "contiguous columns", "strides");
  if ((recurrences > 1 && recurrence < columns) || (count > 1 && row < columns)) {
    refuse(name, "rows that do not overlap", "strides (" + std::to_string(row) + ", " + std::to_string(recurrence) + ")");
  }
  return {pointer<T>(name, array), row, recurrence};
}

// One matrix of `name`: rows x columns with contiguous columns; returns its row stride.
template <class T>
Index matrix(const std::string& name, const py::array& array, Index row_count, Index columns) {
  check_shape<T>(name, array, {row_count, columns});
  if (array.size() == 0) return columns;
  if (columns > 1 && stride<T>(name, array, 1) != 1) refuse(name, "contiguous rows", "strides");
  const Index row = stride<T>(name, array, 0);
  if (row_count > 1 && row < columns) refuse(name, "rows that do not overlap", std::to_string(row));
  return row;
}

// Memory that a kernel writes while another argument is read must not be part of it.
inline void check_apart(const std::string& name, const py::array& a, const std::string& other, const py::array& b) {
  const auto span = [](const py::array& x) {
    const char* begin = static_cast<const char*>(x.data());
    Index bytes = x.itemsize();
    for (py::ssize_t i = 0; i < x.ndim(); ++i) bytes += (x.shape(i) - 1) * x.strides(i);
    return std::make_pair(begin, x.size() ? begin + bytes : begin);
  };
  const auto [a_begin, a_end] = span(a);
  const auto [b_begin, b_end] = span(b);
  if (a_begin < b_end && b_begin < a_end) refuse(name, "memory apart from " + other, "the same memory");
}

// The steps' rows: within the buffers, sorted, never overlapping.
struct CheckedSteps {
  StepRows steps;
  Index rows;  // that a buffer of all steps has at least
  std::vector<std::int64_t> batch_sizes, offsets;

  CheckedSteps(Index length, Index batch, const py::object& batch_sizes_object, const py::object& offsets_object) {
    if (length < 0) refuse("length", "0 or more", std::to_string(length));
    if (batch < 0) refuse("batch", "0 or more", std::to_string(batch));
    steps.length = length;
    steps.batch = batch;
    if (batch_sizes_object.is_none() != offsets_object.is_none()) {
      throw py::value_error("batch_sizes and offsets: expected both or neither");
    }
    if (batch_sizes_object.is_none()) {
      if (__builtin_mul_overflow(length, batch, &rows)) throw py::value_error("length * batch overflows");
      return;
    }
    // Copied, so that what was checked is what the kernels read, whoever else holds the arrays.
    batch_sizes = copy("batch_sizes", batch_sizes_object);
    offsets = copy("offsets", offsets_object);
    rows = 0;
    for (std::size_t t = 0; t < batch_sizes.size(); ++t) {
      const Index most = t ? batch_sizes[t - 1] : batch;
      if (batch_sizes[t] < 0 || batch_sizes[t] > most) {
        refuse("batch_sizes[" + std::to_string(t) + "]", "0 to " + std::to_string(most), std::to_string(batch_sizes[t]));
      }
      Index end;
      if (offsets[t] < rows || __builtin_add_overflow(offsets[t], batch_sizes[t], &end)) {
        refuse("offsets[" + std::to_string(t) + "]", std::to_string(rows) + " or more", std::to_string(offsets[t]));
      }
      rows = end;
    }
    steps.batch_sizes = batch_sizes.data();
    steps.offsets = offsets.data();
  }
  CheckedSteps(const CheckedSteps&) = delete;

 private:
  std::vector<std::int64_t> copy(const std::string& name, const py::object& object) const {
    py::array array = py::cast<py::array>(object);
    const std::int64_t* data = contiguous<const std::int64_t>(name, array, {steps.length});
    return std::vector<std::int64_t>(data, data + steps.length);
  }
};

}  // namespace fused_rnn
