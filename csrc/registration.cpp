// The Python module that carries the native ops, and which functions they are (their schemas: schemas.h).
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
#include "schemas.h"
#if defined(JAMBATALK_CUDA_ARCHITECTURES)
#include "cuda/ops.h"
#endif

// Raised with every change of a schema or of what an op means, here and in jambatalk_kernels/backends.py: a library
// that was built from another version of the sources is then refused, not called.
#define JAMBATALK_NATIVE_VERSION 5

namespace jambatalk {
void empty_op(const Tensor&) {}
}  // namespace jambatalk

STABLE_TORCH_LIBRARY(jambatalk, m) { jambatalk::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(jambatalk, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&jambatalk::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&jambatalk::selective_scan_backward));
  m.impl("selective_scan_step", TORCH_BOX(&jambatalk::selective_scan_step));
  m.impl("causal_conv1d", TORCH_BOX(&jambatalk::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&jambatalk::causal_conv1d_backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&jambatalk::causal_conv1d_step));
  m.impl("moe_route", TORCH_BOX(&jambatalk::moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&jambatalk::moe_route_backward));
  m.impl("moe_mlp", TORCH_BOX(&jambatalk::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&jambatalk::moe_mlp_backward));
  m.impl("rope_attention", TORCH_BOX(&jambatalk::rope_attention));
  m.impl("rope_attention_backward", TORCH_BOX(&jambatalk::rope_attention_backward));
  m.impl("rope_attention_append", TORCH_BOX(&jambatalk::rope_attention_append));
  m.impl("rope_attention_step", TORCH_BOX(&jambatalk::rope_attention_step));
  m.impl("rollout", TORCH_BOX(&jambatalk::rollout));
  m.impl("dropout", TORCH_BOX(&jambatalk::dropout));
  m.impl("layer_norm_gelu", TORCH_BOX(&jambatalk::layer_norm_gelu));
  m.impl("layer_norm_gelu_backward", TORCH_BOX(&jambatalk::layer_norm_gelu_backward));
  m.impl("rms_norm", TORCH_BOX(&jambatalk::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&jambatalk::rms_norm_backward));
  m.impl("empty_op", TORCH_BOX(&jambatalk::empty_op));
}

#if defined(JAMBATALK_CUDA_ARCHITECTURES)
STABLE_TORCH_LIBRARY_IMPL(jambatalk, CUDA, m) { jambatalk::cuda::implement_ops(m); }
#else
#define JAMBATALK_CUDA_ARCHITECTURES ""
#endif

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
  // As in TORCH_CUDA_ARCH_LIST: "8.0;9.0a;12.0+PTX". Empty in a library without CUDA.
  PyModule_AddStringConstant(result, "CUDA_ARCHITECTURES", JAMBATALK_CUDA_ARCHITECTURES);
  return result;
}
