-- Operator patterns for refusals
-- depends: 0008_suppression_patterns

-- migrate: apply

create table bounce_patterns (
    id bigint generated always as identity primary key,
    position int not null unique deferrable initially deferred,   -- 1, 2, 3 …: the first that matches wins
    pattern text not null unique check (octet_length(pattern) <= 8192),
    verdict text not null,                                        -- domain.bounce_patterns.Verdict
    note text not null default '',
    created_at timestamptz not null default now()
);

create table bounce_pattern_version (version bigint not null);
insert into bounce_pattern_version values (1);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
