/* sum = a + b, float32 of two dimensions; refuses arrays of different shapes. */
#include "runtime.h"

MODEL("[    { \"type\" : \"f32\" , \"dims\" : [-1 , \"columns\"] , \"name\" : \"a\" }\n"
      " ,    { \"type\" : \"f32\" , \"dims\" : [-1 , \"columns\"] , \"name\" : \"b\" }\n\n]",
      "[   { \"type\" : \"f32\" , \"dims\" : [-1 , \"columns\"] , \"name\" : \"sum\" }\n\n]",
      "run_main_graph" OM_TEXT(TAG))

ENTRY(run_main_graph) {
  OMTensor *a = in->tensors[0], *b = in->tensors[1];
  if (in->size != 2 || a->rank != 2 || memcmp(a->shape, b->shape, 16)) return om_fail(EINVAL);
  OMTensor *sum = om_new(a->shape, 2, FLOAT, 4);
  for (int64_t i = 0; i < a->shape[0] * a->shape[1]; i++)
    ((float *)sum->data)[i] = ((float *)a->data)[i] + ((float *)b->data)[i];
  return omTensorListCreate(&sum, 1);
}
