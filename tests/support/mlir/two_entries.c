/* run_add and run_subtract of two int64 vectors, which must have 3 elements each. */
#include "runtime.h"

static const char *const ADD[] = {"[ { \"type\" : \"i64\" , \"dims\" : [3] , \"name\" : \"x\" }\n , "
                                  "{ \"type\" : \"i64\" , \"dims\" : [3] , \"name\" : \"y\" }\n\n]",
                                  "[ { \"type\" : \"i64\" , \"dims\" : [3] , \"name\" : \"sum\" }\n\n]"};
static const char *const SUBTRACT[] = {"[ { \"type\" : \"i64\" , \"dims\" : [3] , \"name\" : \"from\" }\n , "
                                       "{ \"type\" : \"i64\" , \"dims\" : [3] , \"name\" : \"what\" }\n\n]",
                                       "[ { \"type\" : \"i64\" , \"dims\" : [3] , \"name\" : \"left\" }\n\n]"};

MODEL(strcmp(entry, "run_add") ? SUBTRACT[0] : ADD[0], strcmp(entry, "run_add") ? SUBTRACT[1] : ADD[1],
      "run_add", "run_subtract")

static OMTensorList *combine(OMTensorList *in, int sign) {
  OMTensor *made = om_new(in->tensors[0]->shape, 1, INT64, 8);
  for (int i = 0; i < 3; i++)
    ((int64_t *)made->data)[i] =
        ((int64_t *)in->tensors[0]->data)[i] + sign * ((int64_t *)in->tensors[1]->data)[i];
  return omTensorListCreate(&made, 1);
}

ENTRY(run_add) { return combine(in, 1); }
ENTRY(run_subtract) { return combine(in, -1); }
