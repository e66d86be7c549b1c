//! Who is who: SPIFFE identities, the built-in CA, tokens, policies.
