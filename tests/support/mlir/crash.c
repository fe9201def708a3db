/* Touches memory that is not its own. */
#include "runtime.h"

MODEL("[ { \"type\" : \"f32\" , \"dims\" : [-1] , \"name\" : \"x\" } ]",
      "[ { \"type\" : \"f32\" , \"dims\" : [-1] , \"name\" : \"y\" } ]", "run_main_graph")

ENTRY(run_main_graph) {
  if (*(float *)in->tensors[0]->data > 0) *(volatile int *)8 = 1;
  return omTensorListCreate(in->tensors, 1);
}
