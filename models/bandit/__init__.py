"""What is not known yet, and how to find out: posteriors, and slates that are drawn from them.

Knows nothing about retrieval, features or storage.

    posterior   per item: discounted Beta of clicks, Normal-Gamma of dwell and rating; priors from alike items
    last_layer  Bayesian linear layer over the ranker's last hidden features, with forgetting
    rewards     what a shown item earned, by surface: the label of the last layer
    policy      a slate drawn slot by slot from sampled scores, with the propensity of each position
"""

from models.bandit.last_layer import LastLayer as LastLayer
from models.bandit.policy import BOUND as BOUND
from models.bandit.policy import POLICIES as POLICIES
from models.bandit.policy import SAMPLES as SAMPLES
from models.bandit.policy import Policy as Policy
from models.bandit.policy import draw as draw
from models.bandit.policy import explored as explored
from models.bandit.policy import item_samples as item_samples
from models.bandit.policy import propensities as propensities
from models.bandit.policy import shares as shares
from models.bandit.posterior import FIRST as FIRST
from models.bandit.rewards import Rewards as Rewards
from models.bandit.rewards import RewardTable as RewardTable
from models.bandit.rewards import examination as examination
