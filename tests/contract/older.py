"""What older versions of onnxruntime and numpy do otherwise themselves, so that the contract is not theirs.

The contract is that of the newest onnxruntime.  A proxy has it on older ones, too, where it is its own doing.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
import onnxruntime

_BEFORE_1_30: Final = """
test_a_result_as_an_array_of_others test_a_results_memory test_an_allocated_output_of_another_shape_is_refused
test_an_input_of_none test_an_ortvalue_is_written_to test_an_ortvalue_of_the_sessions_allocator
test_captured_graphs test_dynamic_options test_external_data_lies_beside_the_model
test_external_initializers_from_files_in_memory test_four_bit_types test_memory_that_does_not_fit[shape]
test_narrow_types test_ortvalues_of_another_session test_ortvalues_that_it_cannot_make
test_providers_that_are_a_number test_binding_contract::test_run_options test_sequences_that_are_refused[None]
test_sources_that_are_refused[empty] test_the_graphs_assignment test_values_that_a_dense_input_refuses[None]
test_values_that_fit_the_model_but_not_each_other test_what_a_result_is test_what_the_outputs_are
""".split()
"""Methods that came later, words of errors, and what narrow types are taken for."""
_BEFORE_NUMPY_2: Final = """
test_names_in_everything_that_is_a_list_to_onnxruntime test_ortvalues_contract::test_text
test_text_and_sequences_as_ortvalues
""".split()
"""Text that is not ASCII in an array of bytes, and whether an empty array is true."""


def is_otherwise(module: str, name: str) -> bool:
    """Whether a test of a module, by its name and parameters, does not hold on what is installed."""
    plain = re.sub(r"(\[|-)(onnxruntime|proxy)(?=[-\]])-?", r"\1", name).replace("[]", "")
    bare = plain.partition("[")[0]
    if _is_old() and re.search(r"[\[-]onnxruntime[-\]]", name):
        return True  # some of these end the process that tries them, at once or later
    return not _apart().isdisjoint({plain, bare, f"{module}::{bare}"})


def _apart() -> set[str]:
    return {
        *(_BEFORE_1_30 if _is_old() else []),
        *(_BEFORE_NUMPY_2 if _release(np.__version__) < (2, 0) else []),
    }


def _is_old() -> bool:
    return _release(onnxruntime.__version__) < (1, 30)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
