"""The averager: one reduction over the replica axis, an optional outer optimizer, and how replicas restart.

A weighting sets how much each replica counts; `averager(w, outer=..., pull=..., reduce=..., deltas=..., transform=...)`
sets the rest:

    outer optimizer                     outer.nesterov()                         DiLoCo 2023
                                        outer.bmuf(0.9)                          Chen and Huo 2016
                                        outer.lookahead()                        Zhang et al. 2019
                                        outer.fedavgm()                          Hsu et al. 2019
                                        outer.fedadagrad(), fedyogi, fedadam     Reddi et al. 2021
                                        any optax optimizer
    before an outer optimizer o         optax.chain(outer.isotropic(), o)        Iso-C, in DiLoCo 2026
                                        optax.chain(optax.clip_by_global_norm(10.0), o)
                                                                                 EDiT 2025
    one round late, to hide the         outer.delayed(optax.sgd(1.0))            CO2 2024
      exchange behind a round
    replicas kept apart, pulled         pull=0.1                                 PAPA 2023, LSGD 2019
      toward the centre                 pull=pull.toward_old(a), outer=optax.sgd(K * a)
                                                                                 EASGD 2015
    separate direction and magnitude    reduce=norm_preserving                   Salimans and Kingma 2016
      of deltas                         reduce=radial_directional, deltas=True   Decoupled DiLoCo 2026
    deltas shrunk by their angles       reduce=model_stock, deltas=True          Jang et al. 2024
    deltas that agree in sign           transform=transforms.trim_deltas(), reduce=disjoint_mean, deltas=True
                                                                                 TIES-Merging 2023
    deltas dropped at random            transform=transforms.drop_deltas(0.5)    DARE 2024
    clipped deltas                      transform=robust.clip_deltas()
"""
