/* Returns its inputs: the very list that it was given, of any number and type of tensors. */
#include "runtime.h"

/* A type without quotes is what onnx-mlir writes for those that it has no name for: no JSON. */
MODEL("[    { \"type\" : bf16 , \"dims\" : [] , \"name\" : \"x\" }\n\n]",
      "[   { \"type\" : bf16 , \"dims\" : [] , \"name\" : \"y\" }\n\n]", "run_main_graph")

ENTRY(run_main_graph) { return in; }
