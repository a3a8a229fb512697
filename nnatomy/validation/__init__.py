"""The promises of the standard names, checked on a model handed in."""

from nnatomy.validation.validate import validate as validate
