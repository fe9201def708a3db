/* y = x; each run keeps 10 MB for ever. */
#include "runtime.h"

MODEL("[ { \"type\" : \"f32\" , \"dims\" : [-1] , \"name\" : \"x\" } ]",
      "[ { \"type\" : \"f32\" , \"dims\" : [-1] , \"name\" : \"y\" } ]", "run_main_graph")

void *kept;

ENTRY(run_main_graph) {
  kept = memset(malloc(10000000), 1, 10000000);
  return omTensorListCreate(in->tensors, 1);
}
