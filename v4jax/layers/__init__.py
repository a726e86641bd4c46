"""The layers of DeepSeek-V4, one idea a file.

Legend of dims, used in every einsum, comment and docstring:

    B batch            T query tokens        S key slots          C compressed entries
    D hidden_size      N attention heads     H head_dim           R low rank
    G output groups    M residual streams    E routed experts     K experts a token
    F expert hidden    V vocabulary          I index heads        J index_head_dim
    W sliding window   P flat tokens (B*T)

Matrices are stored [out, in] as released and applied as `x @ w.T`. Parameters are float32
masters; a layer computes in its input's dtype, and in float32 wherever the release does.
"""
