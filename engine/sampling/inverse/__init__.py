"""What is measured of an image: linear operators with their exact structure, for `sf.PiGDM`."""

from stepfuse.engine.sampling.inverse.blur import Blur
from stepfuse.engine.sampling.inverse.foreign import Foreign
from stepfuse.engine.sampling.inverse.matrix import Dense
from stepfuse.engine.sampling.inverse.operator import Operator
from stepfuse.engine.sampling.inverse.pixels import Downsample, Mask, Outpaint
from stepfuse.engine.sampling.inverse.radon import Radon

__all__ = ["Blur", "Dense", "Downsample", "Foreign", "Mask", "Operator", "Outpaint", "Radon"]
