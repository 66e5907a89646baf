// The CUDA extension's Python side: the operators, and what `fastxkd doctor` asks to tell a machine
// without a device from one whose driver is too old for the runtime linked in.
#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "cuda/device.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA side of fastxkd: device addresses in, device addresses out. Private.";
  m.attr("ARCHITECTURES") = FXK_CUDA_ARCHITECTURES;
  m.def("device_count", [] { return fxk::cuda::device_count().devices; });
  m.def("problem", []() -> py::object {
    const char* why = fxk::cuda::device_count().problem;
    if (why == nullptr) return py::none();
    return py::str(why);
  });
  m.def("versions", [] {
    const auto v = fxk::cuda::versions();
    return py::make_tuple(v.runtime, v.driver);
  });
  fxk::cuda::bind_operators(m);
}
