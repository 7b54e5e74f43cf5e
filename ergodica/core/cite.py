"""What to cite for the methods that a run used."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx

BIBLIOGRAPHY: dict[str, str] = {
    "abadi2016": """@inproceedings{abadi2016,
  author = {Abadi, Martin and Chu, Andy and Goodfellow, Ian and McMahan, H. Brendan and Mironov, Ilya and Talwar, Kunal
    and Zhang, Li},
  title = {Deep Learning with Differential Privacy},
  booktitle = {Proceedings of the 2016 ACM SIGSAC Conference on Computer and Communications Security},
  pages = {308--318}, year = {2016}
}""",
    "ahn2012": """@inproceedings{ahn2012,
  author = {Ahn, Sungjin and Korattikara, Anoop and Welling, Max},
  title = {Bayesian Posterior Sampling via Stochastic Gradient {F}isher Scoring},
  booktitle = {Proceedings of the 29th International Conference on Machine Learning}, year = {2012}
}""",
    "ahn2014": """@inproceedings{ahn2014,
  author = {Ahn, Sungjin and Shahbaba, Babak and Welling, Max},
  title = {Distributed Stochastic Gradient {MCMC}},
  booktitle = {Proceedings of the 31st International Conference on Machine Learning}, pages = {1044--1052}, year = {2014}
}""",
    "alamo2016": """@article{alamo2016,
  author = {Alamo, A. and Sanz-Serna, J. M.},
  title = {A Technique for Studying Strong and Weak Local Errors of Splitting Stochastic Integrators},
  journal = {SIAM Journal on Numerical Analysis}, volume = {54}, number = {6}, pages = {3239--3257}, year = {2016}
}""",
    "baker2019": """@article{baker2019,
  author = {Baker, Jack and Fearnhead, Paul and Fox, Emily B. and Nemeth, Christopher},
  title = {Control Variates for Stochastic Gradient {MCMC}},
  journal = {Statistics and Computing}, volume = {29}, pages = {599--615}, year = {2019}
}""",
    "baydin2022": """@misc{baydin2022,
  author = {Baydin, Atılım Güneş and Pearlmutter, Barak A. and Syme, Don and Wood, Frank and Torr, Philip},
  title = {Gradients without Backpropagation}, note = {arXiv:2202.08587}, year = {2022}
}""",
    "bengio2013": r"""@misc{bengio2013,
  author = {Bengio, Yoshua and L{\'e}onard, Nicholas and Courville, Aaron},
  title = {Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation},
  note = {arXiv:1308.3432}, year = {2013}
}""",
    "burda2016": """@inproceedings{burda2016,
  author = {Burda, Yuri and Grosse, Roger and Salakhutdinov, Ruslan},
  title = {Importance Weighted Autoencoders},
  booktitle = {4th International Conference on Learning Representations}, year = {2016}
}""",
    "ceperley1999": """@article{ceperley1999,
  author = {Ceperley, D. M. and Dewing, M.},
  title = {The Penalty Method for Random Walks with Uncertain Energies},
  journal = {The Journal of Chemical Physics}, volume = {110}, number = {20}, pages = {9812--9820}, year = {1999}
}""",
    "chin1997": """@article{chin1997,
  author = {Chin, Siu A.},
  title = {Symplectic Integrators from Composite Operator Factorizations},
  journal = {Physics Letters A}, volume = {226}, number = {6}, pages = {344--348}, year = {1997}
}""",
    "chung2017": """@inproceedings{chung2017,
  author = {Chung, Junyoung and Ahn, Sungjin and Bengio, Yoshua},
  title = {Hierarchical Multiscale Recurrent Neural Networks},
  booktitle = {5th International Conference on Learning Representations}, year = {2017}
}""",
    "defazio2014": """@inproceedings{defazio2014,
  author = {Defazio, Aaron and Bach, Francis and Lacoste-Julien, Simon},
  title = {{SAGA}: A Fast Incremental Gradient Method with Support for Non-Strongly Convex Composite Objectives},
  booktitle = {Advances in Neural Information Processing Systems 27}, year = {2014}
}""",
    "deng2020": """@inproceedings{deng2020,
  author = {Deng, Wei and Feng, Qi and Gao, Liyao and Liang, Faming and Lin, Guang},
  title = {Non-convex Learning via Replica Exchange Stochastic Gradient {MCMC}},
  booktitle = {Proceedings of the 37th International Conference on Machine Learning}, pages = {2474--2483}, year = {2020}
}""",
    "ding2014": """@inproceedings{ding2014,
  author = {Ding, Nan and Fang, Youhan and Babbush, Ryan and Chen, Changyou and Skeel, Robert D. and Neven, Hartmut},
  title = {Bayesian Sampling Using Stochastic Gradient Thermostats},
  booktitle = {Advances in Neural Information Processing Systems 27}, pages = {3203--3211}, year = {2014}
}""",
    "dong2020": """@inproceedings{dong2020,
  author = {Dong, Zhe and Mnih, Andriy and Tucker, George},
  title = {{DisARM}: An Antithetic Gradient Estimator for Binary Latent Variables},
  booktitle = {Advances in Neural Information Processing Systems 33}, year = {2020}
}""",
    "dubey2016": """@inproceedings{dubey2016,
  author = {Dubey, Avinava and Reddi, Sashank J. and Póczos, Barnabás and Smola, Alexander J. and Xing, Eric P. and
    Williamson, Sinead A.},
  title = {Variance Reduction in Stochastic Gradient {L}angevin Dynamics},
  booktitle = {Advances in Neural Information Processing Systems 29}, year = {2016}
}""",
    "dong2022": """@article{dong2022,
  author = {Dong, Jinshuo and Roth, Aaron and Su, Weijie J.},
  title = {Gaussian Differential Privacy},
  journal = {Journal of the Royal Statistical Society Series B}, volume = {84}, number = {1}, pages = {3--37}, year = {2022}
}""",
    "duane1987": """@article{duane1987,
  author = {Duane, Simon and Kennedy, A. D. and Pendleton, Brian J. and Roweth, Duncan},
  title = {Hybrid {Monte Carlo}},
  journal = {Physics Letters B}, volume = {195}, number = {2}, pages = {216--222}, year = {1987}
}""",
    "elmekkaoui2021": """@inproceedings{elmekkaoui2021,
  author = {El Mekkaoui, Khaoula and Mesquita, Diego and Blomstedt, Paul and Kaski, Samuel},
  title = {Federated Stochastic Gradient {L}angevin Dynamics},
  booktitle = {Proceedings of the 37th Conference on Uncertainty in Artificial Intelligence}, pages = {1703--1712},
  year = {2021}
}""",
    "figurnov2018": """@inproceedings{figurnov2018,
  author = {Figurnov, Michael and Mohamed, Shakir and Mnih, Andriy},
  title = {Implicit Reparameterization Gradients},
  booktitle = {Advances in Neural Information Processing Systems 31}, year = {2018}
}""",
    "gu2016": """@inproceedings{gu2016,
  author = {Gu, Shixiang and Levine, Sergey and Sutskever, Ilya and Mnih, Andriy},
  title = {{MuProp}: Unbiased Backpropagation for Stochastic Neural Networks},
  booktitle = {4th International Conference on Learning Representations}, year = {2016}
}""",
    "jang2017": """@inproceedings{jang2017,
  author = {Jang, Eric and Gu, Shixiang and Poole, Ben},
  title = {Categorical Reparameterization with {G}umbel-Softmax},
  booktitle = {5th International Conference on Learning Representations}, year = {2017}
}""",
    "jiang2024": """@inproceedings{jiang2024,
  author = {Jiang, Jinyang and Zhang, Zeliang and Xu, Chenliang and Yu, Zhaofei and Peng, Yijie},
  title = {One Forward is Enough for Neural Network Training via Likelihood Ratio Method},
  booktitle = {12th International Conference on Learning Representations}, year = {2024}
}""",
    "johnson2013": """@inproceedings{johnson2013,
  author = {Johnson, Rie and Zhang, Tong},
  title = {Accelerating Stochastic Gradient Descent using Predictive Variance Reduction},
  booktitle = {Advances in Neural Information Processing Systems 26}, year = {2013}
}""",
    "kingma2014": """@inproceedings{kingma2014,
  author = {Kingma, Diederik P. and Welling, Max},
  title = {Auto-Encoding Variational {B}ayes},
  booktitle = {2nd International Conference on Learning Representations}, year = {2014}
}""",
    "kool2019": """@inproceedings{kool2019,
  author = {Kool, Wouter and van Hoof, Herke and Welling, Max},
  title = {Buy 4 {REINFORCE} Samples, Get a Baseline for Free!},
  booktitle = {Deep Reinforcement Learning Meets Structured Prediction, ICLR workshop}, year = {2019}
}""",
    "leimkuhler2013": """@article{leimkuhler2013,
  author = {Leimkuhler, Benedict and Matthews, Charles},
  title = {Rational Construction of Stochastic Numerical Methods for Molecular Sampling},
  journal = {Applied Mathematics Research eXpress}, volume = {2013}, number = {1}, pages = {34--56}, year = {2013}
}""",
    "leimkuhler2016": """@article{leimkuhler2016,
  author = {Leimkuhler, Benedict and Shang, Xiaocheng},
  title = {Adaptive Thermostats for Noisy Gradient Systems},
  journal = {SIAM Journal on Scientific Computing}, volume = {38}, number = {2}, pages = {A712--A736}, year = {2016}
}""",
    "li2016": """@inproceedings{li2016,
  author = {Li, Chunyuan and Chen, Changyou and Carlson, David and Carin, Lawrence},
  title = {Preconditioned Stochastic Gradient {L}angevin Dynamics for Deep Neural Networks},
  booktitle = {Proceedings of the 30th AAAI Conference on Artificial Intelligence}, pages = {1788--1794}, year = {2016}
}""",
    "li2023noise": """@inproceedings{li2023noise,
  author = {Li, Oscar and Harrison, James and Sohl-Dickstein, Jascha and Smith, Virginia and Metz, Luke},
  title = {Variance-Reduced Gradient Estimation via Noise-Reuse in Online Evolution Strategies},
  booktitle = {Advances in Neural Information Processing Systems 36}, year = {2023}
}""",
    "liu2023": """@inproceedings{liu2023,
  author = {Liu, Liyuan and Dong, Chengyu and Liu, Xiaodong and Yu, Bin and Gao, Jianfeng},
  title = {Bridging Discrete and Backpropagation: Straight-Through and Beyond},
  booktitle = {Advances in Neural Information Processing Systems 36}, year = {2023}
}""",
    "louis1982": """@article{louis1982,
  author = {Louis, Thomas A.},
  title = {Finding the Observed Information Matrix when Using the {EM} Algorithm},
  journal = {Journal of the Royal Statistical Society, Series B}, volume = {44}, number = {2}, pages = {226--233}, year = {1982}
}""",
    "maddison2017": """@inproceedings{maddison2017,
  author = {Maddison, Chris J. and Mnih, Andriy and Teh, Yee Whye},
  title = {The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables},
  booktitle = {5th International Conference on Learning Representations}, year = {2017}
}""",
    "mnih2014": """@inproceedings{mnih2014,
  author = {Mnih, Andriy and Gregor, Karol},
  title = {Neural Variational Inference and Learning in Belief Networks},
  booktitle = {Proceedings of the 31st International Conference on Machine Learning}, pages = {1791--1799}, year = {2014}
}""",
    "mnih2016": """@inproceedings{mnih2016,
  author = {Mnih, Andriy and Rezende, Danilo J.},
  title = {Variational Inference for {Monte Carlo} Objectives},
  booktitle = {Proceedings of the 33rd International Conference on Machine Learning}, pages = {2188--2196}, year = {2016}
}""",
    "mohamed2020": """@article{mohamed2020,
  author = {Mohamed, Shakir and Rosca, Mihaela and Figurnov, Michael and Mnih, Andriy},
  title = {{Monte Carlo} Gradient Estimation in Machine Learning},
  journal = {Journal of Machine Learning Research}, volume = {21}, number = {132}, pages = {1--62}, year = {2020}
}""",
    "nesterov2017": """@article{nesterov2017,
  author = {Nesterov, Yurii and Spokoiny, Vladimir},
  title = {Random Gradient-Free Minimization of Convex Functions},
  journal = {Foundations of Computational Mathematics}, volume = {17}, pages = {527--566}, year = {2017}
}""",
    "neyman1934": """@article{neyman1934,
  author = {Neyman, Jerzy},
  title = {On the Two Different Aspects of the Representative Method: The Method of Stratified Sampling and the Method of
    Purposive Selection},
  journal = {Journal of the Royal Statistical Society}, volume = {97}, number = {4}, pages = {558--625}, year = {1934}
}""",
    "paulus2021": """@inproceedings{paulus2021,
  author = {Paulus, Max B. and Maddison, Chris J. and Krause, Andreas},
  title = {{Rao--Blackwellizing} the Straight-Through {G}umbel-Softmax Gradient Estimator},
  booktitle = {9th International Conference on Learning Representations}, year = {2021}
}""",
    "pflug1989": """@article{pflug1989,
  author = {Pflug, Georg Ch.},
  title = {Sampling Derivatives of Probabilities},
  journal = {Computing}, volume = {42}, pages = {315--328}, year = {1989}
}""",
    "pillutla2022": """@article{pillutla2022,
  author = {Pillutla, Krishna and Kakade, Sham M. and Harchaoui, Zaid},
  title = {Robust Aggregation for Federated Learning},
  journal = {IEEE Transactions on Signal Processing}, volume = {70}, pages = {1142--1154}, year = {2022}
}""",
    "polyak1992": """@article{polyak1992,
  author = {Polyak, Boris T. and Juditsky, Anatoli B.},
  title = {Acceleration of Stochastic Approximation by Averaging},
  journal = {SIAM Journal on Control and Optimization}, volume = {30}, number = {4}, pages = {838--855}, year = {1992}
}""",
    "putcha2023": """@inproceedings{putcha2023,
  author = {Putcha, Srshti and Nemeth, Christopher and Fearnhead, Paul},
  title = {Preferential Subsampling for Stochastic Gradient {L}angevin Dynamics},
  booktitle = {Proceedings of the 26th International Conference on Artificial Intelligence and Statistics}, year = {2023}
}""",
    "ranganath2014": """@inproceedings{ranganath2014,
  author = {Ranganath, Rajesh and Gerrish, Sean and Blei, David M.},
  title = {Black Box Variational Inference},
  booktitle = {Proceedings of the 17th International Conference on Artificial Intelligence and Statistics},
  pages = {814--822}, year = {2014}
}""",
    "roeder2017": """@inproceedings{roeder2017,
  author = {Roeder, Geoffrey and Wu, Yuhuai and Duvenaud, David},
  title = {Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference},
  booktitle = {Advances in Neural Information Processing Systems 30}, year = {2017}
}""",
    "salimans2017": """@misc{salimans2017,
  author = {Salimans, Tim and Ho, Jonathan and Chen, Xi and Sidor, Szymon and Sutskever, Ilya},
  title = {Evolution Strategies as a Scalable Alternative to Reinforcement Learning},
  note = {arXiv:1703.03864}, year = {2017}
}""",
    "sarkar2025": """@misc{sarkar2025,
  author = {Sarkar, Bidipta and Fellows, Mattie and Duque, Juan Agustin and Letcher, Alistair and others},
  title = {Evolution Strategies at the Hyperscale}, note = {arXiv:2511.16652}, year = {2025}
}""",
    "schulman2015": """@inproceedings{schulman2015,
  author = {Schulman, John and Heess, Nicolas and Weber, Theophane and Abbeel, Pieter},
  title = {Gradient Estimation Using Stochastic Computation Graphs},
  booktitle = {Advances in Neural Information Processing Systems 28}, year = {2015}
}""",
    "spall1992": """@article{spall1992,
  author = {Spall, James C.},
  title = {Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation},
  journal = {IEEE Transactions on Automatic Control}, volume = {37}, number = {3}, pages = {332--341}, year = {1992}
}""",
    "titsias2015": r"""@inproceedings{titsias2015,
  author = {Titsias, Michalis K. and L{\'a}zaro-Gredilla, Miguel},
  title = {Local Expectation Gradients for Black Box Variational Inference},
  booktitle = {Advances in Neural Information Processing Systems 28}, year = {2015}
}""",
    "tucker2017": """@inproceedings{tucker2017,
  author = {Tucker, George and Mnih, Andriy and Maddison, Chris J. and Lawson, Dieterich and Sohl-Dickstein, Jascha},
  title = {{REBAR}: Low-Variance, Unbiased Gradient Estimates for Discrete Latent Variable Models},
  booktitle = {Advances in Neural Information Processing Systems 30}, year = {2017}
}""",
    "tucker2019": """@inproceedings{tucker2019,
  author = {Tucker, George and Lawson, Dieterich and Gu, Shixiang and Maddison, Chris J.},
  title = {Doubly Reparameterized Gradient Estimators for {Monte Carlo} Objectives},
  booktitle = {7th International Conference on Learning Representations}, year = {2019}
}""",
    "vicol2021": """@inproceedings{vicol2021,
  author = {Vicol, Paul and Metz, Luke and Sohl-Dickstein, Jascha},
  title = {Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies},
  booktitle = {Proceedings of the 38th International Conference on Machine Learning}, pages = {10553--10563}, year = {2021}
}""",
    "vicol2023": """@inproceedings{vicol2023,
  author = {Vicol, Paul},
  title = {Low-Variance Gradient Estimation in Unrolled Computation Graphs with {ES-Single}},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning}, year = {2023}
}""",
    "vollmer2016": """@article{vollmer2016,
  author = {Vollmer, Sebastian J. and Zygalakis, Konstantinos C. and Teh, Yee Whye},
  title = {Exploration of the (Non-)Asymptotic Bias and Variance of Stochastic Gradient {L}angevin Dynamics},
  journal = {Journal of Machine Learning Research}, volume = {17}, number = {159}, pages = {1--48}, year = {2016}
}""",
    "walder2025": """@misc{walder2025,
  author = {Walder, Christian and Karkhanis, Deep},
  title = {Pass@{K} Policy Optimization: Solving Harder Reinforcement Learning Problems},
  note = {arXiv:2505.15201}, year = {2025}
}""",
    "wang2024": """@inproceedings{wang2024,
  author = {Wang, Shiqiang and Ji, Mingyue},
  title = {A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging},
  booktitle = {International Conference on Learning Representations}, year = {2024}
}""",
    "welford1962": """@article{welford1962,
  author = {Welford, B. P.},
  title = {Note on a Method for Calculating Corrected Sums of Squares and Products},
  journal = {Technometrics}, volume = {4}, number = {3}, pages = {419--420}, year = {1962}
}""",
    "welling2011": """@inproceedings{welling2011,
  author = {Welling, Max and Teh, Yee Whye},
  title = {Bayesian Learning via Stochastic Gradient {L}angevin Dynamics},
  booktitle = {Proceedings of the 28th International Conference on Machine Learning}, pages = {681--688}, year = {2011}
}""",
    "williams1992": """@article{williams1992,
  author = {Williams, Ronald J.},
  title = {Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning},
  journal = {Machine Learning}, volume = {8}, pages = {229--256}, year = {1992}
}""",
    "xiao2025": """@misc{xiao2025,
  author = {Xiao, Changyi and Zhang, Mengdi and Cao, Yixin},
  title = {{BNPO}: Beta Normalization Policy Optimization}, note = {arXiv:2506.02864}, year = {2025}
}""",
    "yao2025": """@misc{yao2025,
  author = {Yao, Jiarui and Hao, Yifan and Zhang, Hanning and Dong, Hanze and Xiong, Wei and Jiang, Nan and Zhang, Tong},
  title = {Optimizing Chain-of-Thought Reasoners via Gradient Variance Minimization in Rejection Sampling and {RL}},
  note = {arXiv:2505.02391}, year = {2025}
}""",
    "yin2018": """@inproceedings{yin2018,
  author = {Yin, Dong and Chen, Yudong and Ramchandran, Kannan and Bartlett, Peter},
  title = {Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates},
  booktitle = {Proceedings of the 35th International Conference on Machine Learning}, year = {2018}
}""",
    "yin2019": """@inproceedings{yin2019,
  author = {Yin, Mingzhang and Zhou, Mingyuan},
  title = {{ARM}: Augment-{REINFORCE}-Merge Gradient for Stochastic Binary Networks},
  booktitle = {7th International Conference on Learning Representations}, year = {2019}
}""",
    "zhang2020": """@inproceedings{zhang2020,
  author = {Zhang, Ruqi and Cooper, A. Feder and {De Sa}, Christopher},
  title = {{AMAGOLD}: Amortized {M}etropolis Adjustment for Efficient Stochastic Gradient {MCMC}},
  booktitle = {Proceedings of the 23rd International Conference on Artificial Intelligence and Statistics},
  pages = {2142--2152}, year = {2020}
}""",
}


def cite(*algorithms: Any) -> str:
    """Give BibTeX entries for the methods in some samplers or estimators, and in all that they hold.

    Parameters
    ----------
    *algorithms : AbstractKernel or AbstractGradientEstimator

    Returns
    -------
    str

    Examples
    --------
    >>> import ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, initial=0.0)
    >>> print(cite(erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.1)).splitlines()[0])
    @inproceedings{welling2011,
    """
    keys = sorted({key for algorithm in algorithms for key in _keys(algorithm)})
    return "\n\n".join(BIBLIOGRAPHY[key] for key in keys)


def _keys(algorithm: Any) -> Iterator[str]:
    yield from getattr(algorithm, "references", ())
    if isinstance(algorithm, eqx.Module):
        for value in vars(algorithm).values():
            yield from _keys(value)
    if isinstance(algorithm, dict):
        for value in algorithm.values():
            yield from _keys(value)
