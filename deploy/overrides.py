"""A person overrides one gate for one adapter. It takes a scope and a reason, stands in the audit, and every verdict shows it.

Nothing is switched off: the gate is judged as before, and beside its verdict stand who overrode it and why.
"""

from __future__ import annotations

from deploy.approval import another_person
from deploy.gates import gates
from deploy.registry import Registry
from feedback import audit
from feedback.errors import InvalidInput
from feedback.keys import ApiKey, Scope

SCOPE: Scope = "gates:override"
NEVER = ("real labels",)
"""What no reason can justify: an adapter that learned from shuffled ratings learned nothing that anybody said."""


def override(registry: Registry, adapter: str, gate: str, reason: str, key: ApiKey, *, two_people: bool) -> str:
    """Let an adapter pass a gate whatever it says. An adapter that this gate refused is judged again. Returns the attestation's id.

    With `two_people` whoever registered it may not. Raises NotAllowed, NotFound, InvalidInput and PromotionRefused, each saying what to do.
    """
    key.require(SCOPE)
    told = audit.reason(reason)
    record = registry.adapter(adapter)
    another_person("override", record, key, two_people, "override its gates; use another's key")
    names = [each.name for each in gates() if each.name not in NEVER]
    if gate not in names:
        why = "cannot be overridden" if gate in NEVER else "is no gate"
        raise InvalidInput(f"override: '{gate[:64]}' {why}; there are: {', '.join(names)}", field="gate")
    made = registry.attest(record.id, "override", {"gate": gate, "reason": told}, key.owner, reason=f"of {gate}: {told}")
    last = registry.rollouts(record.id)[-1:]
    refused = [row["name"] for row in last[0].verdicts if row.get("verdict") != "pass"] if last else []
    if record.state == "refused" and gate in refused:
        registry.reconsider(record.id, key.owner, f"{key.owner} overrode {gate}: {told}")
    return made
