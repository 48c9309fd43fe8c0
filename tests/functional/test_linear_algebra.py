"""Section 1 of the catalogue: decompositions, products, heads, and the derivative of softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional.linear import embedding, linear
from minillm.functional.linear_algebra import (
    column_decomposition,
    gemm,
    linear_collapse,
    merge_heads,
    project_batch,
    row_decomposition,
    split_heads,
)
from minillm.functional.losses import cross_entropy
from minillm.functional.softmax import logsumexp, softmax, softmax_jacobian
from tests import strategies

MATRICES = strategies.shapes(min_dims=2, max_dims=2, max_side=5).flatmap(strategies.ordinary)


@pytest.mark.equation("column-decomposition", "row-decomposition")
@settings(max_examples=40)
@given(A=MATRICES)
def test_terms_have_rank_at_most_one_and_sum_to_the_matrix_exactly(A):
    m, n = A.shape
    for terms, count in ((column_decomposition(Tensor(A)), n), (row_decomposition(Tensor(A)), m)):
        assert terms.shape == (count, m, n)
        np.testing.assert_array_equal(terms.data.sum(0), A)
        assert all(np.linalg.matrix_rank(term) <= 1 for term in terms.data if term.size)


@pytest.mark.equation("column-decomposition", "row-decomposition")
def test_erratum_1_the_matrix_itself_may_have_full_rank():
    """Each expansion is a sum of rank-one terms; that does not make the matrix one of rank one."""
    A = np.random.default_rng(0).normal(size=(4, 3))
    assert np.linalg.matrix_rank(A) == 3
    for terms in (column_decomposition(Tensor(A)), row_decomposition(Tensor(A))):
        assert [np.linalg.matrix_rank(term) for term in terms.data] == [1] * len(terms)
        assert np.linalg.matrix_rank(terms.data.sum(0)) == 3


@pytest.mark.equation("row-decomposition")
def test_erratum_1_a_row_is_not_transposed():
    """e_i A_i: is a matrix with row i; with the source's extra transpose the product has no meaning for m != n."""
    A = np.arange(6.0).reshape(2, 3)
    unit = np.eye(2)[:, [1]]  # (2, 1)
    np.testing.assert_array_equal(row_decomposition(Tensor(A)).data[1], unit @ A[[1]])
    with pytest.raises(ValueError, match="matmul"):
        unit @ A[[1]].T


@pytest.mark.equation("column-decomposition", "row-decomposition")
def test_a_term_holds_one_column_or_row_in_its_place():
    A = np.arange(1.0, 7.0).reshape(2, 3)
    columns, rows = column_decomposition(Tensor(A)).data, row_decomposition(Tensor(A)).data
    np.testing.assert_array_equal(columns[2], [[0, 0, 3], [0, 0, 6]])
    np.testing.assert_array_equal(rows[0], [[1, 2, 3], [0, 0, 0]])


@pytest.mark.equation("row-decomposition", "embedding-as-onehot-matmul")
def test_looking_up_a_row_is_multiplying_by_a_unit_vector():
    W = np.random.default_rng(0).normal(size=(5, 3))
    one_hot = np.eye(5)[[3, 0]]
    np.testing.assert_array_equal(one_hot @ W, embedding(np.array([3, 0]), Tensor(W)).data)
    np.testing.assert_array_equal(row_decomposition(Tensor(W)).data[3][3], W[3])


@pytest.mark.equation("gemm")
@settings(max_examples=25)
@given(seed=strategies.seeds(), alpha=st.sampled_from([-1.0, 0.0, 2.0]), beta=st.sampled_from([0.0, 1.0, -0.5]))
def test_gemm_is_torch_addmm(seed, alpha, beta):
    rng = np.random.default_rng(seed)
    m, p, n = rng.integers(1, 5, size=3)
    A, B, C = rng.normal(size=(m, p)), rng.normal(size=(p, n)), rng.normal(size=(m, n))
    wanted = torch.addmm(torch.tensor(C), torch.tensor(A), torch.tensor(B), alpha=alpha, beta=beta)
    np.testing.assert_allclose(gemm(Tensor(A), Tensor(B), Tensor(C), alpha, beta).data, wanted, atol=1e-13)


@pytest.mark.equation("gemm")
def test_gemm_does_not_read_what_it_does_not_need():
    A, B = Tensor(np.ones((2, 2))), Tensor(np.eye(2))
    assert gemm(A, B, Tensor(np.full((2, 2), np.nan)), beta=0.0).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert gemm(A, B, alpha=3.0).tolist() == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.equation("batched-matmul")
@settings(max_examples=20)
@given(seed=strategies.seeds(), B=st.integers(0, 3), L=st.integers(0, 4))
def test_one_product_for_the_batch_equals_one_for_every_sequence(seed, B, L):
    rng = np.random.default_rng(seed)
    X, W = Tensor(rng.normal(size=(B, L, 3)), requires_grad=True), Tensor(rng.normal(size=(3, 4)), requires_grad=True)
    at_once = project_batch(X, W)
    assert at_once.shape == (B, L, 4)
    for b in range(B):
        np.testing.assert_allclose(at_once.data[b], X.data[b] @ W.data, atol=1e-14)
    together = grad(at_once.sum(), W).data
    one_by_one = sum((grad((X[b] @ W).sum(), W).data for b in range(B)), np.zeros((3, 4)))
    np.testing.assert_allclose(together, one_by_one, atol=1e-13, err_msg="weights shared over the batch add gradients")


@pytest.mark.equation("head-split-merge")
@settings(max_examples=25)
@given(seed=strategies.seeds(), H=st.integers(1, 4), d_head=st.integers(1, 3), B=st.integers(0, 2))
def test_split_and_merge_are_inverse_and_heads_read_their_columns(seed, H, d_head, B):
    X = np.random.default_rng(seed).normal(size=(B, 3, H * d_head))
    heads = split_heads(Tensor(X), H)
    assert heads.shape == (B, H, 3, d_head)
    for h in range(H):
        np.testing.assert_array_equal(heads.data[:, h], X[:, :, h * d_head : (h + 1) * d_head])
    np.testing.assert_array_equal(merge_heads(heads).data, X)
    np.testing.assert_array_equal(split_heads(merge_heads(heads), H).data, heads.data)


@pytest.mark.equation("linear-collapse")
@settings(max_examples=25)
@given(seed=strategies.seeds())
def test_two_affine_maps_are_one(seed):
    rng = np.random.default_rng(seed)
    d_in, d_mid, d_out = (int(n) for n in rng.integers(1, 5, size=3))
    W_2, b_2, W_1, b_1 = (Tensor(rng.normal(size=s)) for s in [(d_out, d_mid), (d_out,), (d_mid, d_in), (d_mid,)])
    x = Tensor(rng.normal(size=(6, d_in)))
    stacked = linear(linear(x, W_1, b_1), W_2, b_2)
    one = linear_collapse(W_2, b_2, W_1, b_1)
    np.testing.assert_allclose(linear(x, one.W, one.b).data, stacked.data, atol=1e-13)
    assert np.linalg.matrix_rank(one.W.data) <= min(d_in, d_mid, d_out)


@pytest.mark.equation("linear-collapse")
def test_an_activation_in_between_prevents_the_collapse():
    """No affine map sends -1, 0 and 1 to 1, 0 and 1; two with a ReLU in between do."""
    W_1, W_2 = Tensor(np.array([[1.0], [-1.0]])), Tensor(np.array([[1.0, 1.0]]))
    x = Tensor(np.array([[-1.0], [0.0], [1.0]]))
    assert linear(linear(x, W_1).relu(), W_2).tolist() == [[1.0], [0.0], [1.0]]
    one = linear_collapse(W_2, Tensor(np.zeros(1)), W_1, Tensor(np.zeros(2)))
    assert linear(x, one.W, one.b).tolist() == [[0.0], [0.0], [0.0]]


@pytest.mark.equation("softmax-jacobian")
@settings(max_examples=20)
@given(seed=strategies.seeds())
def test_the_jacobian_of_softmax_is_what_the_engine_finds_row_by_row(seed):
    rng = np.random.default_rng(seed)
    z = Tensor(rng.normal(size=(2, int(rng.integers(1, 5)))), requires_grad=True)
    p = softmax(z)
    n = z.shape[1]
    jacobian = softmax_jacobian(p.detach()).data  # (2, n, n)
    for b in range(2):
        rows = [grad(p[b, i], z, retain_graph=True).data[b] for i in range(n)]
        np.testing.assert_allclose(jacobian[b], np.stack(rows), atol=1e-14)
    np.testing.assert_allclose(jacobian.sum(-1), 0, atol=1e-15)  # shifting all logits changes nothing
    np.testing.assert_array_equal(jacobian, jacobian.swapaxes(1, 2))


@pytest.mark.equation("softmax-jacobian", "cross-entropy-logits")
def test_through_the_jacobian_the_gradient_of_the_loss_is_p_minus_onehot():
    z = np.array([[0.3, -1.2, 2.0]])
    p = softmax(Tensor(z)).data[0]
    by_chain_rule = (-np.eye(3)[1] / p[1]) @ softmax_jacobian(Tensor(p)).data
    np.testing.assert_allclose(by_chain_rule, p - np.eye(3)[1], atol=1e-15)
    leaf = Tensor(z, requires_grad=True)
    np.testing.assert_allclose(grad(cross_entropy(leaf, np.array([1])), leaf).data[0], p - np.eye(3)[1], atol=1e-15)


@pytest.mark.equation("logsumexp", "softmax")
def test_the_gradient_of_logsumexp_is_softmax():
    z = Tensor(np.array([1000.0, 1001.0, 999.0]), requires_grad=True)
    slope = grad(logsumexp(z), z)
    np.testing.assert_allclose(slope.data, softmax(z.detach()).data, atol=1e-15)


@pytest.mark.equation("softmax-stable")
def test_the_worked_number_of_the_stable_softmax():
    z = Tensor(np.array([1000.0, 1001.0, 999.0]))
    np.testing.assert_allclose(softmax(z).data, [0.2447, 0.6652, 0.0900], atol=5e-5)


REFUSED = {
    "a vector": (lambda: column_decomposition(Tensor(np.ones(3))), "column_decomposition: A must be a matrix"),
    "a cube": (lambda: row_decomposition(Tensor(np.ones((1, 1, 1)))), "row_decomposition: A must be a matrix"),
    "inner lengths": (
        lambda: gemm(Tensor(np.ones((2, 3))), Tensor(np.ones((2, 3)))),
        "gemm: A and B must be of shapes",
    ),
    "the shape of C": (
        lambda: gemm(Tensor(np.eye(2)), Tensor(np.eye(2)), Tensor(np.ones((1, 2)))),
        r"gemm: C must be of shape \(2, 2\), got shape \(1, 2\)",
    ),
    "the width": (
        lambda: project_batch(Tensor(np.ones((1, 2, 3))), Tensor(np.ones((4, 3)))),
        "project_batch: X and W must be of shapes",
    ),
    "too many heads": (lambda: split_heads(Tensor(np.ones((1, 2, 4))), 3), r"\(B, L, H d_head\) with H = 3"),
    "no heads": (lambda: split_heads(Tensor(np.ones((1, 2, 4))), 0), "split_heads: H must be a positive integer"),
    "three axes": (lambda: merge_heads(Tensor(np.ones((1, 2, 4)))), "merge_heads: X must be of shape"),
    "maps that do not fit": (
        lambda: linear_collapse(*(Tensor(np.ones(s)) for s in [(2, 3), (2,), (2, 2), (2,)])),
        "linear_collapse: W_2 and W_1 must be",
    ),
    "the inner bias": (
        lambda: linear_collapse(*(Tensor(np.ones(s)) for s in [(2, 3), (2,), (3, 2), (2,)])),
        r"linear_collapse: b_1 must be of shape \(3,\)",
    ),
    "the outer bias": (
        lambda: linear_collapse(*(Tensor(np.ones(s)) for s in [(2, 3), (3,), (3, 2), (3,)])),
        r"linear_collapse: b_2 must be of shape \(2,\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_shapes_that_do_not_fit_are_refused(what):
    call, text = REFUSED[what]
    with pytest.raises(ValueError, match=text):
        call()
