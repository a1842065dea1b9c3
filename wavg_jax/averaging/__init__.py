"""The averager: one reduction over the replica axis, an optional outer optimizer, and how replicas restart.

A weighting sets how much each replica counts; `averager(w, outer=..., pull=..., reduce=..., transform=...)` sets the
rest:

    outer optimizer                     outer.nesterov()                         DiLoCo 2023
                                        outer.bmuf(0.9)                          Chen and Huo 2016
                                        outer.lookahead()                        Zhang et al. 2019
                                        outer.fedavgm()                          Hsu et al. 2019
                                        outer.fedadagrad(), fedyogi, fedadam     Reddi et al. 2021
                                        any optax optimizer
    one round late, to hide the         outer.delayed(optax.sgd(1.0))            CO2 2024
      exchange behind a round
    replicas kept apart, pulled         pull=0.1                                 PAPA 2023, LSGD 2019
      toward the centre                 pull=pull.toward_old(a), outer=optax.sgd(K * a)
                                                                                 EASGD 2015
    separate direction and magnitude    reduce=norm_preserving                   Salimans and Kingma 2016
    clipped deltas                      transform=robust.clip_deltas()
"""
