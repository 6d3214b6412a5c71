"""Executables as files: one zip that is built anywhere and loaded without compiling anything.

    plan.json               per program (a target and a range of batches): inputs and outputs with
                            dtype, layout and range, buffers and their places in the arena, the
                            launches with their grid rules, kernels by member, versions used
    graph.json              the optimised graphs: what other targets lower again, and drawings show
    ledger.json             the account of every rewrite, for `convloom explain`
    weights.safetensors     folded and packed constants, each distinct tensor once
    kernels/sm_90/*.cubin   machine code; of the oldest generation also PTX where it is portable
    manifest.json           size and sha256 of every other member

What can be relied on:

- A file is accepted only if it is, byte for byte, what the writer would have written around its
  members (`archive.py`): nothing is compressed, no name appears twice or leaves the table of known
  names, nothing lies between members, and every JSON text is in its one canonical form.
- The file is read once: what is checked is what is used, whatever becomes of it afterwards.
- Every member is hashed and `plan.json` is checked (`check.py`) before a kernel is loaded or memory
  of a size that the file names is allocated: offsets within arenas, arguments within buffers,
  grids, reads of what nobody wrote, buffers that overlap while both are alive.
- Nothing is unpickled and nothing in a file is code, except the machine code of kernels (cubin and
  PTX), which is native code for the GPU: hashes prove that it is what was saved, not that whoever
  saved it meant well. Load kernels only from people you would accept a program from, or once
  `rederive.py` has made the same ones from the graphs.
- The same module, weights, versions and tuning records give the same bytes: times are fixed,
  members sorted, and kernels compiled without the paths of their sources.
- A file appears under its name whole or not at all: it is written beside it, synced and renamed.

A grid depends on the batch by one rule that is exact for every batch of the range:
`ceil(rows / largest batch * batch / block_rows) * columns` programs, or the launch's own limit
where that is less and each program computes several tiles. Launches that this rule cannot express,
and kernels that need more than pointers, tensor maps (`maps.py`) and the number of rows (scratch
memory of the compiler's), are refused when a file is written.
"""
