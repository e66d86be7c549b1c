# The peer's key made the token of the segment before ours.
package nsm

default valid = false

valid {
	before := object.get(input, "index", 0) - 1
	before >= 0
	io.jwt.verify_es256(input.path_segments[before].token, input.auth_info.certificate)
}
