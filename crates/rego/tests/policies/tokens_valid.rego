# Every segment's token can be read as a JWT.
package nsm

default valid = false

valid {
	segments := object.get(input, "path_segments", [])
	readable := [i | io.jwt.decode(segments[i].token)]
	count(readable) == count(segments)
}
