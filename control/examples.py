"""What to send: one worked request body or more for each operation that takes one, shown in the OpenAPI document.

By `operation_id`, then by content type, then by what it shows. A test decodes each with the type of its route, and posts them.
"""

from typing import Any, Final

_CSV: Final = "text/csv"
_LINES: Final = "application/x-ndjson"
_JSON: Final = "application/json"

_NEWS: Final = (
    "<h1>Hello {{ subscriber.first_name | default: 'there' }}</h1>"
    '<p><a href="https://shop.example.com/spring">The new season</a></p><p><a href="{{ links.unsubscribe }}">Unsubscribe</a></p>'
)
_CAMPAIGN: Final[dict[str, Any]] = {
    "name": "Spring news",
    "list_id": 1,
    "delivery_server_id": 1,
    "subject": "Spring is here, {{ subscriber.first_name | default: 'dear reader' }}",
    "from_name": "Garden Shop",
    "from_email": "news@garden.example.com",
    "html": _NEWS,
    "preheader": "Seeds, tools and a voucher",
    "track_links": True,
    "track_opens": True,
    "utm_source": "sluice",
    "utm_medium": "email",
}
_RECEIPT: Final[dict[str, Any]] = {
    "delivery_server_id": 1,
    "subject": "Your order {{ subscriber.order }}",
    "from_email": "shop@garden.example.com",
    "html": "<p>Thank you, {{ subscriber.name }}. Order {{ subscriber.order }} is on its way.</p>",
}
_ADA: Final[dict[str, Any]] = {"email": "ada@reader.example.com", "data": {"name": "Ada", "order": "4711"}}

EXAMPLES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "createUser": {_JSON: {"a user": {"name": "garden", "email": "office@garden.example.com"}}},
    "updateUser": {_JSON: {"switch off": {"disabled": True}}},
    "createApiKey": {_JSON: {"for a shop": {"name": "shop", "scope": "user"}}},
    "createList": {_JSON: {"a list": {"name": "News", "sender_name": "Garden Shop", "sender_email": "news@garden.example.com"}}},
    "updateList": {_JSON: {"another name": {"name": "Newsletter"}}},
    "createCustomField": {_JSON: {"a number": {"name": "orders", "kind": "number"}, "a text": {"name": "city"}}},
    "addSubscriber": {_JSON: {"with merge data": {"email": "ada@reader.example.com", "data": {"city": "Rome", "orders": 3}}}},
    "updateSubscriber": {
        _JSON: {"merge data": {"data": {"city": "Lyon", "orders": None}}, "off the list": {"state": "unsubscribed"}},
    },
    "importSubscribers": {
        _CSV: {"with a header line": "email,first_name,city\nada@reader.example.com,Ada,Rome\nbob@reader.example.com,Bob,\n"},
        _LINES: {"an object a line": '{"email": "ada@reader.example.com", "city": "Rome"}\n{"email": "bob@reader.example.com"}\n'},
    },
    "createDeliveryServer": {
        _JSON: {
            "a relay": {
                "name": "relay",
                "host": "smtp.example.com",
                "port": 587,
                "security": "starttls",
                "username": "sluice",
                "password": "secret",
                "mfrom": "bounce.garden.example.com",
                "link_domain": "links.garden.example.com",
                "limits": {"max_connections": 20, "max_messages_per_second": 100.0, "retry_schedule_seconds": [300, 900, 3600]},
            },
            "with a fallback": {"name": "first", "host": "mta1.example.com", "fallback_server_id": 1},
        }
    },
    "updateDeliveryServer": {_JSON: {"slower": {"limits": {"max_messages_per_second": 20.0}}, "off": {"enabled": False}}},
    "testDeliveryServer": {_JSON: {"to yourself": {"to": "me@garden.example.com"}}},
    "createDkimKey": {
        _JSON: {
            "made here": {"domain": "garden.example.com"},
            "Ed25519 beside it": {"domain": "garden.example.com", "selector": "ed1", "algorithm": "ed25519-sha256", "activate": False},
        }
    },
    "createCustomHeader": {
        _JSON: {"campaigns only": {"name": "X-Campaign", "value": "{{ campaign.id }}", "mail_classes": ["marketing"]}},
    },
    "createCampaign": {
        _JSON: {
            "HTML": _CAMPAIGN,
            "MJML": {
                **{name: value for name, value in _CAMPAIGN.items() if name != "html"},
                "mjml": "<mjml><mj-body><mj-section><mj-column><mj-text>Hello {{ subscriber.first_name }}"
                '<br><a href="{{ links.unsubscribe }}">Unsubscribe</a></mj-text></mj-column></mj-section></mj-body></mjml>',
            },
        }
    },
    "updateCampaign": {_JSON: {"subject": {"subject": "Spring is nearly over"}}},
    "addSeed": {_JSON: {"an address": {"email": "seed@garden.example.com"}}},
    "sendMessage": {
        _JSON: {
            "a receipt": {
                **_RECEIPT,
                "recipients": [_ADA],
                "metadata": {"order": "4711"},
                "attachments": [{"filename": "receipt.txt", "content": "T3JkZXIgNDcxMQo=", "content_type": "text/plain"}],
            },
            "to members of a list": {
                **_RECEIPT,
                "mail_class": "autoresponder",
                "list_id": 1,
                "headers": {"X-Flow": "welcome"},
                "recipients": [_ADA, {"email": "bob@reader.example.com", "data": {"name": "Bob", "order": "4712"}}],
            },
        }
    },
    "streamMessage": {
        _LINES: {
            "content first": '{"delivery_server_id": 1, "from_email": "shop@garden.example.com", '
            '"subject": "Your code", "text": "{{ subscriber.code }}"}\n{"email": "ada@reader.example.com", "data": {"code": "123456"}}\n'
            '{"email": "bob@reader.example.com", "data": {"code": "654321"}}\n'
        }
    },
    "setS2s": {_JSON: {"Voluum": {"parameter": "cid", "value_parameter": "payout", "unit": "$", "channel": "voluum"}}},
    "addSuppressions": {
        _JSON: {
            "for all lists": {"emails": ["ada@reader.example.com", "*@*.spamtrap.example.com"], "note": "asked by telephone"},
            "for one list": {"emails": ["bob@reader.example.com"], "scope": "list", "list_id": 1, "reason": "unsubscribed"},
        }
    },
    "removeSuppressions": {_JSON: {"for all lists": {"emails": ["ada@reader.example.com"]}}},
    "importSuppressions": {_CSV: {"addresses": "address,text\nada@reader.example.com,asked by telephone\nexample.org,competitor\n"}},
    "importResults": {
        _CSV: {"results": "address,type,when,text\nada@reader.example.com,hard,2026-11-20T10:00:00Z,550 5.1.1 unknown user\n"},
    },
    "addBouncePattern": {_JSON: {"words": {"pattern": "mailbox is frozen", "verdict": "inactive-mailbox|Hard", "note": "GardenMail"}}},
    "moveBouncePattern": {_JSON: {"to the front": {"position": 1}}},
    "importBouncePatterns": {_JSON: {"lines": {"lines": ["mailbox is frozen==>Hard", "/try .* later/==>Soft"], "replace": False}}},
    "testBouncePattern": {_JSON: {"a reply": {"reply": "550 5.1.1 mailbox is frozen", "line": "mailbox is frozen==>Hard"}}},
    "putForwarding": {
        _JSON: {
            "answers to the office": {
                "aliases": "reply@news.garden.example.com:office@garden.example.com", "forward_to": "admin@garden.example.com",
                "abuse_to": "trust@garden.example.com",
            }
        }
    },
    "testForwarding": {_JSON: {"an address of ours": {"recipient": "reply@news.garden.example.com"}}},
}  # fmt: skip


def add_to(operation: dict[str, Any]) -> None:
    """Put the examples of an operation of the OpenAPI document where they belong, and describe streamed bodies, which nobody else does."""
    for media_type, shown in EXAMPLES.get(operation["operationId"], {}).items():
        body = operation.setdefault("requestBody", {"required": True, "content": {}})
        described = body["content"].setdefault(media_type, {"schema": {"type": "string", "format": "binary"}})
        described["examples"] = {name: {"value": value} for name, value in shown.items()}
