"""Sparse training of topk and batchtopk: everything but the encoder's product costs k of F features.

A step: the encoder's product in compute type; the k largest of every token (`Pairs` of a token and a feature that is active on it); the decoder
rows of these pairs give reconstruction, error and the gradient of each activation; the pairs, sorted by feature, give every feature's weight
gradients; then one pass per feature row for clip, Adam, anchor, unit norm and the copy in compute type that the next product reads. 2 d F + 8 d k
operations per token, where the dense algebra (`stagediff.sae.gradients`) takes 10 d F.

`engine` is the step, `kernels` chooses who computes its parts: `reference` is plain torch, needs no compiler and is what the others are tested
against; `cpu` is numba; `gpu` is Triton, for CUDA. All of them are exact, break ties by the lowest index, and add in a fixed order.
"""
