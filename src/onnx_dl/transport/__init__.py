"""How processes talk: messages, failures, tensors in shared memory, sockets, lanes."""
