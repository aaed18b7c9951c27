"""The one logger of this package: users set its level, commands its format."""

import logging

logger = logging.getLogger("wfnet")
