/* A shared library that has nothing to do with onnx-mlir. */
int answer(void) { return 42; }
