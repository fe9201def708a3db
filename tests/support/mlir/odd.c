/* Returns an element of the OM_DATA_TYPE that it is given; without data if that is negative. */
#include "runtime.h"

MODEL("[ { \"type\" : \"i64\" , \"dims\" : [1] , \"name\" : \"type\" } ]",
      "[ { \"seq\" : { \"type\" : \"f32\" , \"dims\" : [] , \"name\" : \"x\" }\n } ]", "run_main_graph")

ENTRY(run_main_graph) {
  int64_t type = *(int64_t *)in->tensors[0]->data;
  OMTensor *made = om_new((int64_t[]){1}, 1, labs(type), 64);
  if (type < 0) made->data = NULL;
  return omTensorListCreate(&made, 1);
}
