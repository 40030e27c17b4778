"""Backbones and restorers. Importing a system file registers its models with timm."""

from visionhybrid.models import a2mamba as a2mamba
from visionhybrid.models import hat as hat
from visionhybrid.models import mala as mala
from visionhybrid.models import nextvit as nextvit
from visionhybrid.models import ravlt as ravlt
from visionhybrid.models import vit as vit
