// Every native op's schema, and the Python module that carries them.
//
// The module is top-level and named apart from the packages, so that a clone's folder never shadows the installed
// library. Importing it registers the ops with torch (torch.ops.jambatalk.*); the shape functions for torch.compile and
// the gradients are Python's (jambatalk_kernels/*/op.py). Only PyTorch's stable ABI and Python's limited API are used.
#include <Python.h>

#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/ops.h"

// Raised with every change of a schema or of what an op means, here and in jambatalk_kernels/backends.py: a library
// that was built from another version of the sources is then refused, not called.
#define JAMBATALK_NATIVE_VERSION 1

namespace jambatalk {
void empty_op(const Tensor&) {}
}  // namespace jambatalk

STABLE_TORCH_LIBRARY(jambatalk, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool save_states) "
      "-> (Tensor y, Tensor final_state, Tensor chunk_states)");
  m.def(
      "selective_scan_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor chunk_states, bool delta_softplus) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, "
      "Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)");
  m.def(
      "selective_scan_step(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, bool delta_softplus) -> Tensor");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def("causal_conv1d_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor");
  m.def("empty_op(Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jambatalk, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&jambatalk::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&jambatalk::selective_scan_backward));
  m.impl("selective_scan_step", TORCH_BOX(&jambatalk::selective_scan_step));
  m.impl("causal_conv1d", TORCH_BOX(&jambatalk::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&jambatalk::causal_conv1d_backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&jambatalk::causal_conv1d_step));
  m.impl("empty_op", TORCH_BOX(&jambatalk::empty_op));
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(jambatalk::kernels().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* set_cpu_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  PyObject* result = nullptr;
  try {
    jambatalk::use_isa(PyBytes_AsString(bytes));
    result = Py_None;
    Py_INCREF(result);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  Py_DECREF(bytes);
  return result;
}

PyObject* supported_cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (const std::string& name : jambatalk::supported_isas()) {
    PyObject* item = PyUnicode_FromString(name.c_str());
    if (item == nullptr || PyList_Append(names, item) != 0) {
      Py_XDECREF(item);
      Py_DECREF(names);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return names;
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set in use: avx512, avx2, plain or wide."},
    {"set_cpu_isa", set_cpu_isa, METH_O,
     "Use the named instruction set from now on. RuntimeError if it cannot run here."},
    {"supported_cpu_isas", supported_cpu_isas, METH_NOARGS,
     "What this processor can run, best first; 'wide' is for tests."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_jambatalk_native",
                      "The native kernels of JambaTalk.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__jambatalk_native(void) {
  PyObject* result = PyModule_Create(&module);
  if (result == nullptr) return nullptr;
  PyModule_AddIntConstant(result, "VERSION", JAMBATALK_NATIVE_VERSION);
#if defined(__clang__)
  PyModule_AddStringConstant(result, "COMPILER", __VERSION__);  // names itself
#else
  PyModule_AddStringConstant(result, "COMPILER", "GCC " __VERSION__);
#endif
  PyModule_AddStringConstant(result, "BUILT_WITH_TORCH", JAMBATALK_BUILT_WITH_TORCH);
  return result;
}
