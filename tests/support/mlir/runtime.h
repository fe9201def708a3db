/* The part of onnx-mlir's C ABI that a compiled model carries in itself, for the tests' own models.
 *
 * Functions and their meaning are those of onnx-mlir's public headers (OMTensor.h, OMTensorList.h,
 * OMEntryPoint.h, OMSignature.h); this implementation is ours.  MODEL() writes what a model says of itself.
 * om_live counts what was created and not destroyed.  With -DTAG=_name, the model's own functions end in it.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { STRING = 8, INT64 = 7, FLOAT = 1 };

typedef struct {
  void *data, *owned;
  int64_t *shape, *strides, rank;
  int type;
} OMTensor;

typedef struct {
  OMTensor **tensors;
  int64_t size;
} OMTensorList;

int64_t om_live = 0;

OMTensor *omTensorCreate(void *data, const int64_t *shape, int64_t rank, int type) {
  OMTensor *made = malloc(sizeof *made);
  *made = (OMTensor){data, NULL, calloc(rank + 1, 8), calloc(rank + 1, 8), rank, type};
  for (int64_t i = rank - 1, stride = 1; i >= 0; stride *= shape[i--]) {
    made->shape[i] = shape[i];
    made->strides[i] = stride;
  }
  om_live++;
  return made;
}

void omTensorDestroy(OMTensor *tensor) {
  free(tensor->owned);
  free(tensor->shape);
  free(tensor->strides);
  memset(tensor, 0xff, sizeof *tensor); /* whoever uses it once more finds out */
  free(tensor);
  om_live--;
}

void *omTensorGetDataPtr(const OMTensor *tensor) { return tensor->data; }
const int64_t *omTensorGetShape(const OMTensor *tensor) { return tensor->shape; }
const int64_t *omTensorGetStrides(const OMTensor *tensor) { return tensor->strides; }
int64_t omTensorGetRank(const OMTensor *tensor) { return tensor->rank; }
int omTensorGetDataType(const OMTensor *tensor) { return tensor->type; }

OMTensorList *omTensorListCreate(OMTensor **tensors, int64_t size) {
  OMTensorList *made = malloc(sizeof *made);
  made->tensors = malloc((size + 1) * sizeof *tensors);
  memcpy(made->tensors, tensors, size * sizeof *tensors);
  made->size = size;
  om_live++;
  return made;
}

void omTensorListDestroyShallow(OMTensorList *list) {
  free(list->tensors);
  memset(list, 0xff, sizeof *list);
  free(list);
  om_live--;
}

OMTensor **omTensorListGetOmtArray(OMTensorList *list) { return list->tensors; }
int64_t omTensorListGetSize(OMTensorList *list) { return list->size; }

/* A tensor of so many elements of so many bytes, which owns its memory. */
static inline OMTensor *om_new(const int64_t *shape, int64_t rank, int type, int64_t size) {
  for (int64_t i = 0; i < rank; i++) size *= shape[i];
  OMTensor *made = omTensorCreate(NULL, shape, rank, type);
  made->data = made->owned = malloc(size + 1);
  return made;
}

static inline OMTensorList *om_fail(int number) {
  errno = number;
  return NULL;
}

#ifndef TAG
#define TAG
#endif
#define OM_JOIN_(a, b) a##b
#define OM_JOIN(a, b) OM_JOIN_(a, b)
#define OM_TEXT_(a) #a
#define OM_TEXT(a) OM_TEXT_(a)
#define OM_NAME(name) OM_JOIN(name, TAG)
#define ENTRY(name) OMTensorList *OM_NAME(name)(OMTensorList * in)

#define MODEL(inputs, outputs, ...)                                                  \
  const char *const *OM_NAME(omQueryEntryPoints)(int64_t * count) {                  \
    static const char *const names[] = {__VA_ARGS__, NULL};                          \
    if (count) *count = sizeof names / sizeof *names - 1;                            \
    return names;                                                                    \
  }                                                                                  \
  const char *OM_NAME(omInputSignature)(const char *entry) { return inputs; }        \
  const char *OM_NAME(omOutputSignature)(const char *entry) { return outputs; }
