"""What orders the candidates: models over their features, and what is made of their scores.

Knows nothing about how features came to be, nor about retrieval.

    kernels       compiled loops of the listwise models
    listwise      linear model and network over the features; the better one scores
    calibration   the probability that a shown item is chosen, from its score
    drift         alarms where a model's prequential loss has risen for good
    heads         the weighted sum of what each head says of an item
"""

from models.ranker.calibration import Calibration as Calibration
from models.ranker.listwise import LAST as LAST
from models.ranker.listwise import Ranker as Ranker
