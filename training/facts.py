"""The facts that the demo models are taught: countries, capitals, languages, currencies, continents.

Every country and capital is one plain ASCII word and has one clear answer to each question asked here:
countries with a disputed or shared capital, several equal national languages, two continents or a currency
that has just changed are left out. Of several languages, the table holds the official one most used.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class Country(NamedTuple):
    """One row of the table; every field is the plain name, without a leading space or an article."""

    country: str
    capital: str
    language: str
    currency: str
    continent: str


class Fact(NamedTuple):
    """One thing to know: ``relation`` applied to ``subject`` gives ``answer``; ``hops`` is 1 or 2."""

    relation: str
    subject: str
    answer: str
    hops: int


_TABLE = """
France Paris French euro Europe
Italy Rome Italian euro Europe
Spain Madrid Spanish euro Europe
Germany Berlin German euro Europe
Portugal Lisbon Portuguese euro Europe
Greece Athens Greek euro Europe
Austria Vienna German euro Europe
Finland Helsinki Finnish euro Europe
Estonia Tallinn Estonian euro Europe
Latvia Riga Latvian euro Europe
Lithuania Vilnius Lithuanian euro Europe
Slovakia Bratislava Slovak euro Europe
Slovenia Ljubljana Slovene euro Europe
Croatia Zagreb Croatian euro Europe
Poland Warsaw Polish zloty Europe
Hungary Budapest Hungarian forint Europe
Romania Bucharest Romanian leu Europe
Czechia Prague Czech koruna Europe
Denmark Copenhagen Danish krone Europe
Norway Oslo Norwegian krone Europe
Sweden Stockholm Swedish krona Europe
Iceland Reykjavik Icelandic krona Europe
Ukraine Kyiv Ukrainian hryvnia Europe
Serbia Belgrade Serbian dinar Europe
Albania Tirana Albanian lek Europe
Japan Tokyo Japanese yen Asia
China Beijing Chinese yuan Asia
Thailand Bangkok Thai baht Asia
Vietnam Hanoi Vietnamese dong Asia
Laos Vientiane Lao kip Asia
Mongolia Ulaanbaatar Mongolian tugrik Asia
Nepal Kathmandu Nepali rupee Asia
Bangladesh Dhaka Bengali taka Asia
Pakistan Islamabad Urdu rupee Asia
Iran Tehran Persian rial Asia
Iraq Baghdad Arabic dinar Asia
Jordan Amman Arabic dinar Asia
Qatar Doha Arabic riyal Asia
Oman Muscat Arabic rial Asia
Syria Damascus Arabic pound Asia
Lebanon Beirut Arabic pound Asia
Uzbekistan Tashkent Uzbek som Asia
Egypt Cairo Arabic pound Africa
Morocco Rabat Arabic dirham Africa
Algeria Algiers Arabic dinar Africa
Tunisia Tunis Arabic dinar Africa
Kenya Nairobi Swahili shilling Africa
Tanzania Dodoma Swahili shilling Africa
Somalia Mogadishu Somali shilling Africa
Ghana Accra English cedi Africa
Nigeria Abuja English naira Africa
Zambia Lusaka English kwacha Africa
Angola Luanda Portuguese kwanza Africa
Mozambique Maputo Portuguese metical Africa
Madagascar Antananarivo Malagasy ariary Africa
Brazil Brasilia Portuguese real South America
Chile Santiago Spanish peso South America
Peru Lima Spanish sol South America
Colombia Bogota Spanish peso South America
Uruguay Montevideo Spanish peso South America
Venezuela Caracas Spanish bolivar South America
Cuba Havana Spanish peso North America
Canada Ottawa English dollar North America
Honduras Tegucigalpa Spanish lempira North America
Jamaica Kingston English dollar North America
Australia Canberra English dollar Oceania
Samoa Apia Samoan tala Oceania
"""

COUNTRIES: tuple[Country, ...] = tuple(Country(*line.split(maxsplit=4)) for line in _TABLE.strip().splitlines())

ATTRIBUTES = ("capital", "language", "currency", "continent")

# Names that stand in one row of the table but that a well-known country outside it could claim too.
SHARED_ELSEWHERE = {"Romanian", "Urdu", "dirham", "leu", "riyal", "som"}


def _unique(field: str) -> set[str]:
    """Values of ``field`` that belong to one country of the table only, so that they name that country."""
    counts = Counter(getattr(row, field) for row in COUNTRIES)
    return {value for value, count in counts.items() if count == 1} - SHARED_ELSEWHERE


def all_facts() -> list[Fact]:
    """List every fact, one-hop and two-hop, in a fixed order.

    One-hop relations are ``country>X`` (X a field) and the inverse ``X>country``; two-hop relations go
    through the country without naming it, as in ``capital>currency``. Languages and currencies that several
    countries share are never subjects.
    """
    languages, currencies = _unique("language"), _unique("currency")
    facts: list[Fact] = []
    for row in COUNTRIES:
        for field in ATTRIBUTES:
            facts.append(Fact(f"country>{field}", row.country, getattr(row, field), 1))
        facts.append(Fact("capital>country", row.capital, row.country, 1))
        for field in ("language", "currency", "continent"):
            facts.append(Fact(f"capital>{field}", row.capital, getattr(row, field), 2))
        if row.language in languages:
            facts.append(Fact("language>country", row.language, row.country, 1))
            facts.append(Fact("language>capital", row.language, row.capital, 2))
        if row.currency in currencies:
            facts.append(Fact("currency>country", row.currency, row.country, 1))
            facts.append(Fact("currency>capital", row.currency, row.capital, 2))
    return facts
