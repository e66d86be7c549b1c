//! The functions of upstream's interpreter that ours lacks. What is wrong with a token makes them undefined or false,
//! as there; they say nothing that would quote it.

use nsm_identity::{Leaf, token};
use regorus::{Engine, Value};
use rustls_pki_types::{CertificateDer, pem::PemObject};

/// Adds `io.jwt.decode` and `io.jwt.verify_es256`.
pub(crate) fn add(engine: &mut Engine) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    engine.add_extension("io.jwt.decode".into(), 1, Box::new(|args| Ok(decode(&args))))?;
    engine.add_extension("io.jwt.verify_es256".into(), 2, Box::new(|args| Ok(verify_es256(&args))))?;
    Ok(())
}

/// `io.jwt.decode(jwt)`: `[header, payload, signature]`, the signature in hexadecimal; undefined for what is no JWT.
fn decode(args: &[Value]) -> Value {
    let [Value::String(jwt)] = args else { return Value::Undefined };
    let Ok((header, payload, signature)) = token::decode_parts(jwt) else { return Value::Undefined };
    let hex: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
    Value::from(vec![Value::from(header), Value::from(payload), Value::from(hex)])
}

/// `io.jwt.verify_es256(jwt, certificate)`, the certificate as PEM; undefined for what is no JWT or no certificate.
fn verify_es256(args: &[Value]) -> Value {
    let [Value::String(jwt), Value::String(pem)] = args else { return Value::Undefined };
    let Ok(der) = CertificateDer::from_pem_slice(pem.as_bytes()) else { return Value::Undefined };
    let Ok(leaf) = Leaf::parse(der) else { return Value::Undefined };
    token::is_signed_by(jwt, &leaf).map_or(Value::Undefined, Value::from)
}
