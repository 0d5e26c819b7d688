"""What the operators of a step are told: places in their records, int64 each.

Records hold addresses, sizes, and float32 numbers as their bits. An address of 0 stands for what is
not there. Vectors that flow between operators are float32.
"""

from __future__ import annotations

from typing import Final

RECORD_FIELDS: Final = 40

# Of all operators: whether results are rounded to bfloat16.
ROUNDS: Final = 0

# Of products: y = weight x. INPUT tells the inputs of a step apart, so that a thread brings each
# into the order of the weights only once.
INPUT, X, WIDTH, NUM_ROWS, ITEM_ROWS = range(1, 6)
# Taken of x before; whether it is rounded behind its weight only, as Gemma's is.
NORM, EPSILON, NORM_ROUNDS_ONCE = range(6, 9)
# Where y goes and how; the cap is float32, 0 for none.
OUT, EPILOGUE, SOFTCAP = range(9, 12)
NUM_RUNS: Final = 12  # into which rows are cut, whose items are handed out in turns
# Epilogues. INNER values of adapters are scaled, and never rounded; the last three are gates.
STORED, ADDED, INNER, SILU, GELU_TANH, GELU = range(6)
SCALES: Final = 13  # of inner values, float32
# Of products beside which inner values are made: those are there when so many of the step's items
# are done.
INNER_DONE: Final = 14

# Of each of a product's weights, from FIRST_WEIGHT on; gates have another of as many rows.
WEIGHT_FIELDS: Final = 8
FIRST_WEIGHT: Final = 16
SECOND_WEIGHT: Final = FIRST_WEIGHT + WEIGHT_FIELDS
WEIGHT, ABSMAX, NESTED_ABSMAX, NESTED_MAP, NESTED_OFFSET, CODE, SHIFT, BIAS = range(WEIGHT_FIELDS)

# Of the adapter of each of these weights, from FIRST_ADAPTER on: y += inner B. B is of the dtype
# of activations; its rows, one for each of the RANK inner values, are STRIDE values apart.
ADAPTER_FIELDS: Final = 4
FIRST_ADAPTER: Final = SECOND_WEIGHT + WEIGHT_FIELDS
SECOND_ADAPTER: Final = FIRST_ADAPTER + ADAPTER_FIELDS
B, STRIDE, INNER_VALUES, RANK = range(ADAPTER_FIELDS)
ADAPTER_LANES: Final = 16  # rows of y at once: B's own are so much longer, sums have room for them

# Of attention. Queries of all heads, then keys, then values lie side by side; of the cache heads
# are HEAD_STRIDE values apart, and tokens HEAD_DIM.
QUERY_KEY_VALUE, ATTENDED, GROUP_SIZE, KV_HEADS, HEAD_DIM, ROTARY_DIM = range(1, 7)
KEYS, VALUES, HEAD_STRIDE, COSINES, SINES = range(7, 12)
QUERY_NORM, KEY_NORM, HEAD_EPSILON, HEAD_NORM_ROUNDS_ONCE = range(12, 16)
SCALE, SCORE_SOFTCAP, WINDOW, NUM_STRIPS, PARTIALS = range(16, 21)
STRIP: Final = 512  # tokens of an item
PARTIAL_EXTRA: Final = 2  # a strip's highest score and its sum, before its HEAD_DIM values

# Of the embedding; the scale is float32, 0 for none.
EMBEDDING, HIDDEN, HIDDEN_SIZE, EMBEDDING_SCALE = range(1, 5)

# A thread's scratch: what x is arranged for, then the addresses of its places.
ARRANGED_FOR, X_PLACE, NORMED_PLACE, SCALES_PLACE, SUMS_PLACE, ATTENTION_PLACE = range(6)
SCRATCH_FIELDS: Final = 8
