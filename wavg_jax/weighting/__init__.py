"""Weightings: how much each replica counts in the blend.

Every published rule is one expression, and rules compose:

    conventional averaging              uniform()
    FedAvg                              proportional("samples")                  McMahan et al. 2017
    by tokens and steps, c^2 / s        token_weighted()                         Decoupled DiLoCo 2026
    by accuracy; (s - chance)^p         proportional("accuracy", chance=0.1, power=2)
                                                                                 Ramroach and Joshi 2021, in words
    softmax of a score; z-scored        softmax("loss", 0.2); softmax("loss", 1.0, standardise=True)
                                                                                 WASGD
    inverse, rank, leader               inverse("loss"), rank("loss"), best("loss")
                                                                                 LSGD (leader)
    gradient norms on a common batch,   grawa(), grawa(layerwise=True)           GRAWA 2024
      whole or per layer
    Fisher merging, per element         fisher_merging()                         Matena and Raffel 2022
    pooled predictions                  opinion_pool()                  Heskes 1998 (logarithmic opinion pool)
    greedy soup                         greedy_soup()                            Wortsman et al. 2022
    learned on held-out data            learned()                                natural gradient of the softmax
      the cheap form                    learned(carry=True, steps=1)             Kivinen and Warmuth 1997
                                                                                 (exponentiated gradient descent)
    best blend of several               best_of(softmax("loss", 0.2), learned()); equal weights always compete
    robust                              robust.coordinate_median(), robust.trimmed_mean(1)
                                                                                 Yin et al. 2018
                                        robust.geometric_median()                RFA 2022
                                        robust.krum(1), robust.multi_krum(1, keep=6)
                                                                                 Blanchard et al. 2017
                                        robust.mean_around_median(1)             Xie et al. 2018
                                        robust.bulyan(1)                         El Mhamdi et al. 2018
    norms of the deltas, screened       pseudo_gradient_penalty()                EDiT 2025
    around any weighting w              uniform_floor(w, 0.5), momentum(w, 0.9), smooth_signals(w),
                                        shortlist(w, keep=4)

Scores are the task's scalar metrics on held-out data (a classifier's `loss`, `accuracy`, `macro_f1` and `ece`),
`grad_norm`, `layer_grad_norm` and `fisher`, the `distance` to the mean, and, for free, `train_loss`, `samples` and
`steps`; `fit` computes only those the weighting needs. A rule works at the granularity of its score: model, layer or
element. For a score of your own, say which way it points: `inverse("val_loss", higher_is_better=False)`.

All of them pass one table of invariants (`tests/weighting/test_schemes.py`): weights sum to 1; equal replicas stay
unchanged; order does not matter; a dead replica equals a run of the survivors; NaN and infinite scores never spread;
nothing recompiles; sharded equals unsharded. One exception: `greedy_soup` tries replicas whose own scores tie exactly
in the order of their numbers. A replica that is dead, or whose numbers are not finite, has weight 0 in every scheme.
Scores may be zero, negative, NaN or infinite.
"""
