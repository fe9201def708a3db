/* A model that names no entry points; with -DPHANTOM, one that it does not have. */
#include "runtime.h"

#ifdef PHANTOM
MODEL("[]", "[]", "run_phantom")
#else
MODEL("[]", "[]", NULL)
#endif
