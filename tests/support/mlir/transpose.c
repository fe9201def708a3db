/* y, z = the transpose of x, float32 of two dimensions, as strides over a copy; and x itself. */
#include "runtime.h"

MODEL("[ { \"type\" : \"f32\" , \"dims\" : [-1 , -1] , \"name\" : \"x\" } ]",
      "[ { \"type\" : \"f32\" , \"dims\" : [-1 , -1] , \"name\" : \"y\" } , "
      "{ \"type\" : \"f32\" , \"dims\" : [-1 , -1] , \"name\" : \"z\" } ]",
      "run_main_graph")

ENTRY(run_main_graph) {
  OMTensor *x = in->tensors[0], *out[] = {om_new((int64_t[]){x->shape[1], x->shape[0]}, 2, FLOAT, 4), x};
  memcpy(out[0]->data, x->data, x->shape[0] * x->shape[1] * 4);
  out[0]->strides[0] = 1;
  out[0]->strides[1] = x->shape[1];
  return omTensorListCreate(out, 2);
}
