"""The tables are on each database as the models say."""

from __future__ import annotations

import pytest
from django.apps import apps
from django.db.models import Model

from .databases import connection

pytestmark = pytest.mark.django_db


MODELS = list(apps.get_app_config("ebbs_and_flows").get_models())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_index_of_a_model_is_in_the_database(model: type[Model]) -> None:
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, model._meta.db_table)
    assert {index.name for index in model._meta.indexes} <= set(found)
